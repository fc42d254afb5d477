//! The options of the simulated coderd, and its run.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use chrono::TimeDelta;
use tallyline::clock::Clock;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::config::Config;
use super::schema::SchemaVersion;
use super::simulation::Simulation;
use super::truth::Truth;

/// How far ahead a deployment in real time is planned.
const PLAN_AHEAD: TimeDelta = TimeDelta::seconds(10);
const HISTORY_PARTS: i32 = 50;

/// Simulates coderd in an empty PostgreSQL database: creates its tables and writes its rows.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The empty database.
    #[arg(long, value_name = "URL")]
    pub database_url: String,
    /// Determines every id, name, time and outcome.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The least number of completed builds in the history.
    #[arg(long, default_value_t = 5000)]
    pub builds: usize,
    /// The length of the history. Usage older than 30 days cannot be published.
    #[arg(long, default_value_t = 25)]
    pub days: u32,
    /// coderd's schema.
    #[arg(long, value_enum, default_value = "tasks-era")]
    pub schema: SchemaVersion,
    /// After the history, go on in real time until stopped.
    #[arg(long)]
    pub real_time: bool,
    /// Builds per second in real time.
    #[arg(long, default_value_t = 2.0, value_name = "BUILDS")]
    pub rate: f64,
    /// With --real-time: stop after this time, such as 20s or 5m.
    #[arg(long = "for", value_name = "DURATION", requires = "real_time",
          value_parser = tallyline::operations::duration_flag)]
    pub run_for: Option<Duration>,
    /// Write no seat and runtime heartbeats.
    #[arg(long)]
    pub without_heartbeats: bool,
    /// Write the truth to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub truth: Option<PathBuf>,
    /// Write the public key that verifies the licenses to this file, as PEM. Its kid is
    /// coderd-sim-SEED.
    #[arg(long, value_name = "FILE")]
    pub license_key_out: Option<PathBuf>,
}

impl Options {
    #[must_use]
    pub fn config(&self, clock: &Clock) -> Config {
        let end = clock.now();
        let start = end - TimeDelta::days(i64::from(self.days.max(1)));
        Config {
            heartbeats: !self.without_heartbeats,
            ..Config::history(self.seed, self.schema, start, end, self.builds)
        }
    }
}

/// Writes the history, then acts in real time if requested, until `stop`. Returns the truth at the
/// end, and writes it if a file is named.
pub async fn run(options: Options, clock: Clock, stop: CancellationToken) -> anyhow::Result<Truth> {
    ensure!(
        options.rate >= 0.0 && options.rate.is_finite(),
        "--rate: not a number of builds per second"
    );
    let mut simulation = Simulation::start(options.config(&clock), &options.database_url).await?;
    if let Some(file) = &options.license_key_out {
        std::fs::write(file, &simulation.license_key().public_key_pem)
            .with_context(|| format!("write {}", file.display()))?;
    }
    write_history(&mut simulation, &stop).await?;
    info!(
        builds = simulation.completed_builds(),
        usage = simulation.usage_rows(),
        "history written"
    );
    if options.real_time {
        let stop = match options.run_for {
            Some(duration) => stop_after(duration, stop),
            None => stop,
        };
        live(&mut simulation, options.rate, &clock, &stop, |_| {}).await?;
    }
    let truth = simulation.truth();
    if let Some(file) = &options.truth {
        truth.write(file)?;
    }
    Ok(truth)
}

/// Writes it in parts, so that a stop takes effect.
async fn write_history(
    simulation: &mut Simulation,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let (start, end) = (simulation.config().start, simulation.config().end);
    for part in 1..=HISTORY_PARTS {
        if stop.is_cancelled() {
            break;
        }
        simulation
            .advance_to(if part < HISTORY_PARTS {
                start + (end - start) / HISTORY_PARTS * part
            } else {
                end
            })
            .await?;
    }
    simulation.commit_held().await
}

/// Acts in the clock's time until `stop`: `rate` builds per second, one transaction per act. Then
/// commits open transactions. Calls `completed` with the number of completed builds.
pub async fn live(
    simulation: &mut Simulation,
    rate: f64,
    clock: &Clock,
    stop: &CancellationToken,
    completed: impl Fn(usize),
) -> anyhow::Result<()> {
    simulation.set_acts_per_transaction(1);
    // No builds for the time of the history's writing: they would complete before they are visible.
    let mut planned = clock.now().max(simulation.config().end);
    simulation.extend(planned, 0);
    let mut owed = 0.0;
    while !stop.is_cancelled() {
        let now = clock.now();
        if planned < now + PLAN_AHEAD / 2 {
            let until = planned.max(now) + PLAN_AHEAD;
            owed += rate * (until - planned).as_seconds_f64();
            let builds = whole(owed);
            // Whole lives are planned, so there may be more builds than requested: the next plan
            // has fewer.
            owed -= f64::from(u32::try_from(simulation.extend(until, builds as usize))?);
            planned = until;
        }
        simulation.advance_to(now).await?;
        completed(simulation.completed_builds());
        let _ = stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(50))).await;
    }
    simulation.commit_held().await
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // `as` saturates, which is intended
fn whole(builds: f64) -> u32 {
    builds as u32
}

fn stop_after(time: Duration, stop: CancellationToken) -> CancellationToken {
    let child = stop.child_token();
    let ends = child.clone();
    tokio::spawn(async move {
        let _ = ends.run_until_cancelled(tokio::time::sleep(time)).await;
        ends.cancel();
    });
    child
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn a_database_is_enough_and_a_duration_needs_real_time() {
        let parsed = |more: &[&str]| {
            Line::try_parse_from(
                [&["coderd-sim", "--database-url", "postgres://localhost/coder"], more].concat(),
            )
        };
        let options = parsed(&[]).unwrap().options;
        assert_eq!(
            (options.seed, options.builds, options.days, options.schema),
            (1, 5000, 25, SchemaVersion::TasksEra)
        );
        assert_eq!(
            parsed(&["--schema", "sep-2026", "--real-time", "--for", "3s"]).unwrap().options.schema,
            SchemaVersion::Sep2026
        );
        assert!(parsed(&["--for", "3"]).is_err());
        assert!(Line::try_parse_from(["coderd-sim"]).is_err());
    }
}
