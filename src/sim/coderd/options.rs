//! `tallyline coderd-sim`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use chrono::TimeDelta;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::config::Config;
use super::schema::SchemaVersion;
use super::simulation::{PLAN_AHEAD, Simulation};
use super::truth::Truth;
use crate::clock::Clock;

/// Simulates coderd in an empty PostgreSQL database: its tables, and what it writes into them.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The empty database to live in.
    #[arg(long, value_name = "URL")]
    pub database_url: String,
    /// Decides every id, name, time and outcome.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Completed builds in the history, at least.
    #[arg(long, default_value_t = 5000)]
    pub builds: usize,
    /// How long the history is. Usage older than 30 days can no longer be published.
    #[arg(long, default_value_t = 25)]
    pub days: u32,
    /// Which of coderd's schemas.
    #[arg(long, value_enum, default_value = "tasks-era")]
    pub schema: SchemaVersion,
    /// After the history go on acting until stopped, in the time of the clock.
    #[arg(long)]
    pub real_time: bool,
    /// Builds per second in real time.
    #[arg(long, default_value_t = 2.0, value_name = "BUILDS")]
    pub rate: f64,
    /// With --real-time: stop by itself after so many seconds.
    #[arg(long = "for", value_name = "SECONDS", requires = "real_time")]
    pub for_seconds: Option<u64>,
    /// No seat and runtime heartbeats.
    #[arg(long)]
    pub without_heartbeats: bool,
    /// Where to write what is true, as JSON.
    #[arg(long, value_name = "FILE")]
    pub truth: Option<PathBuf>,
    /// Where to write the public key that verifies the licenses, as PEM.
    #[arg(long, value_name = "FILE")]
    pub license_key_out: Option<PathBuf>,
}

impl Options {
    /// The configuration of a history that ends now.
    #[must_use]
    pub fn config(&self, clock: &Clock) -> Config {
        let end = clock.now();
        let start = end - TimeDelta::days(i64::from(self.days.max(1)));
        Config { heartbeats: !self.without_heartbeats, ..Config::history(self.seed, self.schema, start, end, self.builds) }
    }
}

/// Writes the history, then acts in real time if asked to, until `stop`. Gives what is true at the end; writes it, too, if a file is named.
///
/// # Errors
/// When the database cannot be reached, is not empty or refuses, or a file cannot be written.
pub async fn run(options: Options, clock: Clock, stop: CancellationToken) -> anyhow::Result<Truth> {
    ensure!(options.rate >= 0.0 && options.rate.is_finite(), "--rate is a number of builds per second");
    let mut simulation = Simulation::start(options.config(&clock), &options.database_url).await?;
    if let Some(file) = &options.license_key_out {
        std::fs::write(file, &simulation.license_key().public_key_pem).with_context(|| format!("write {}", file.display()))?;
    }
    simulation.finish().await?;
    info!(builds = simulation.completed_builds(), usage = simulation.usage_rows(), "history written");
    if options.real_time {
        let stop = match options.for_seconds {
            Some(seconds) => stop_after(Duration::from_secs(seconds), stop),
            None => stop,
        };
        live(&mut simulation, options.rate, &clock, &stop).await?;
    }
    let truth = simulation.truth();
    if let Some(file) = &options.truth {
        truth.write(file)?;
    }
    Ok(truth)
}

/// Acts in the clock's time, `rate` builds per second, one transaction per act, until `stop`; then commits what is open.
///
/// # Errors
/// When PostgreSQL refuses.
pub async fn live(simulation: &mut Simulation, rate: f64, clock: &Clock, stop: &CancellationToken) -> anyhow::Result<()> {
    simulation.set_acts_per_transaction(1);
    let mut planned = simulation.config().end;
    let mut owed = 0.0;
    while !stop.is_cancelled() {
        let now = clock.now();
        if planned < now + PLAN_AHEAD / 2 {
            let until = planned.max(now) + PLAN_AHEAD;
            owed += rate * (until - planned).as_seconds_f64();
            let builds = whole(owed);
            owed -= f64::from(builds);
            simulation.extend(until, builds as usize);
            planned = until;
        }
        simulation.advance_to(now).await?;
        let _ = stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(50))).await;
    }
    simulation.commit_held().await
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // `as` saturates, and that is what is wanted
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
