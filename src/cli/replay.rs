//! `tallyline replay plan` and `tallyline replay execute`

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::actor::ActorArguments;
use super::api::ApiClient;
use super::output::exact_time;
use super::progress::Progress;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, columns};
use crate::api::{PlanStanding, PlanState};
use crate::operations::{Desk, Effect, LogRange, MovedEnd, ReplayExecution, ReplayPlan, Replayed, Step, WindowEffect};

/// Interval of progress queries to the process that executes a plan.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// First activity of an execution.
const COMPARING: &str = "comparing with the plan";

/// Reread a range of the log.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Replay {
    /// Show the effect of a replay, and the hash that identifies the plan when it is executed
    Plan(Plan),
    /// Execute a plan, or resume it after an interruption
    Execute(Execute),
}

/// Show the effect of a replay.
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    #[command(flatten)]
    via: ViaArguments,
    #[command(flatten)]
    range: RangeArguments,
}

/// The range of the log.
#[derive(Clone, Debug, clap::Args)]
struct RangeArguments {
    /// Topic: NAME for all its partitions, or NAME:0,1,2 for some; may be repeated
    #[arg(long, value_name = "NAME[:PARTITIONS]", required_unless_present = "all_topics", conflicts_with = "all_topics")]
    topic: Vec<String>,
    /// All topics
    #[arg(long)]
    all_topics: bool,
    /// Start of the range: earliest, latest, an offset, an instant (2025-07-01T00:00:00.000, UTC without an offset) or a duration before
    /// now (P1DT2H)
    #[arg(long, value_name = "WHERE")]
    from: String,
    /// End of the range, not included; same notation as --from
    #[arg(long, value_name = "WHERE", default_value = "latest")]
    until: String,
}

/// Execute a plan.
#[derive(Clone, Debug, clap::Args)]
pub struct Execute {
    #[command(flatten)]
    via: ViaArguments,
    /// Hash that `tallyline replay plan` printed
    #[arg(long = "plan", value_name = "HASH")]
    hash: String,
    /// Maximum records reread per second; the default leaves most of the ledger to live consumption
    #[arg(long, value_name = "RECORDS_PER_SECOND", default_value_t = crate::operations::RECORDS_PER_SECOND,
          value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    #[command(flatten)]
    actor: ActorArguments,
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: ReplayPlan,
    execute: String,
}

pub(super) async fn run(replay: Replay, context: Context) -> Result<Exit, Failure> {
    match replay {
        Replay::Plan(arguments) => plan(arguments, &context).await,
        Replay::Execute(arguments) => execute(arguments, &context).await,
    }
}

async fn plan(arguments: Plan, context: &Context) -> Result<Exit, Failure> {
    let RangeArguments { topic: topics, from, until, .. } = arguments.range;
    let range = LogRange { topics, from, until };
    let plan: ReplayPlan = match open(&arguments.via, context).await? {
        Reached::Desk(desk) => {
            let progress = Progress::of_steps("records");
            let planned = desk.plan_replay(&range, |Step { doing, done, total }| progress.at(doing, done, total), &context.stop).await;
            progress.finish();
            planned?
        }
        Reached::Api(api) => unless_stopped(context, api.patient().post(&["replays"], &range, "")).await?,
    };
    if !plan.moved_ends.is_empty() {
        tracing::warn!("{}", moved(&plan.moved_ends));
    }
    let execute = format!("tallyline replay execute {} --plan {}", arguments.via.again(), plan.hash);
    let answer = Planned { plan, execute };
    context.output.answer(&answer, || table(&answer))?;
    Ok(Exit::Success)
}

async fn execute(arguments: Execute, context: &Context) -> Result<Exit, Failure> {
    let request = ReplayExecution { hash: arguments.hash, records_per_second: Some(arguments.rate) };
    let progress = Progress::of_steps("records");
    let executed = match open(&arguments.via, context).await? {
        Reached::Desk(desk) => {
            let told = |Step { doing, done, total }| progress.at(doing, done, total);
            desk.execute_replay(&request, &arguments.actor.actor(), told, &context.stop).await.map_err(Failure::from)
        }
        Reached::Api(api) => {
            let reason = arguments.actor.reason_alone()?;
            unless_stopped(context, over_api(&api, &request, reason, &progress)).await
        }
    };
    progress.finish();
    let answer = executed?;
    context.output.answer(&answer, || sentence(&answer))?;
    Ok(Exit::Success)
}

/// Reports moved ends of ranges in one line, for any number of partitions.
fn moved(ends: &[MovedEnd]) -> String {
    let asked: BTreeSet<String> = ends.iter().map(|end| format!("--{} {}", end.end, end.asked)).collect();
    let mut held: Vec<String> =
        ends.iter().map(|end| format!("{}/{} {} to {}", end.topic, end.partition, end.log_start, end.log_end)).collect();
    held.dedup();
    let asked = asked.into_iter().collect::<Vec<_>>().join(" and ");
    format!("{asked}: not held by every partition, so the nearest offset is taken; the log holds {}", held.join(", "))
}

/// The result of the whole plan, including earlier calls.
fn sentence(replayed: &Replayed) -> String {
    let Replayed { resumed_after, records, accepted, duplicates, conflicts, rejects, held, .. } = replayed;
    let resumed = resumed_after.map(|earlier| format!(", {earlier} of them before it was interrupted")).unwrap_or_default();
    format!(
        "{records} records read again{resumed}: {accepted} new, {duplicates} duplicates, {conflicts} conflicts, {rejects} rejected, {held} held\n"
    )
}

/// Makes a serving process execute the plan, and shows its progress.
async fn over_api(api: &ApiClient, request: &ReplayExecution, reason: &str, progress: &Progress) -> Result<Replayed, Failure> {
    let (plan, body) = (["plans", &request.hash], json!({ "records_per_second": request.records_per_second }));
    let mut standing: PlanStanding = api.post(&["plans", &request.hash, "execute"], &body, reason).await?;
    loop {
        match (standing.state, standing.replayed, standing.problem) {
            (PlanState::Running, ..) => {
                let doing = if standing.doing.as_deref() == Some(COMPARING) { COMPARING } else { "replaying" };
                progress.at(doing, standing.done, standing.total);
                tokio::time::sleep(LOOK_AGAIN).await;
                standing = api.get(&plan, &()).await?;
            }
            (_, Some(replayed), _) => return Ok(replayed),
            (_, _, Some(problem)) => return Err(ApiClient::failure(problem.status, &problem.message)),
            _ => {
                return Err(Failure::of(
                    Exit::Refused,
                    "the process that executed the plan has ended; the same command goes on from there",
                ));
            }
        }
    }
}

/// The reached target.
enum Reached {
    Desk(Box<Desk>),
    /// A serving process.
    Api(ApiClient),
}

async fn open(via: &ViaArguments, context: &Context) -> Result<Reached, Failure> {
    let reached = async {
        Ok(match via.open(context).await? {
            Via::Api(api) => Reached::Api(api),
            Via::Site(site) => {
                site.log.reach().await?;
                Reached::Desk(Box::new(site.desk()?))
            }
        })
    };
    unless_stopped(context, reached).await
}

/// A stop ends the wait; a serving process continues its work.
async fn unless_stopped<T>(context: &Context, asked: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    context.stop.run_until_cancelled(asked).await.unwrap_or_else(|| Err(Failure::interrupted()))
}

fn table(answer: &Planned) -> String {
    let rows = answer.plan.partitions.iter().map(|row| {
        let numbers = [row.first_offset, row.end_offset].map(|offset| offset.to_string());
        let counts = [row.records, row.new_events, row.duplicates, row.conflicts, row.rejects, row.held, row.new_refused];
        let ([first, end], [records, new, duplicates, conflicts, rejects, held, refused]) =
            (numbers, counts.map(|number| number.to_string()));
        [row.topic.clone(), row.partition.to_string(), first, end, records, new, duplicates, conflicts, rejects, held, refused]
    });
    let headings =
        ["TOPIC", "PARTITION", "FROM", "UNTIL", "RECORDS", "NEW", "DUPLICATES", "CONFLICTS", "REJECTED", "HELD", "NEW TO REJECTS"];
    let ranges = columns(headings, rows);
    format!("{ranges}\n{}\nhash     {}\nexecute  {}\n", effect(&answer.plan.effect), answer.plan.hash, answer.execute)
}

/// The effect of new events, for people.
fn effect(effect: &Effect) -> String {
    let mut text = String::new();
    if effect.is_empty() {
        text += "no license count, publication or metric would change\n";
    }
    for deployment in &effect.introduced {
        text += &format!("deployment {deployment} would be introduced\n");
    }
    let changed: Vec<&WindowEffect> = effect.licenses.iter().filter(|row| row.before != row.after).collect();
    if changed.is_empty() && !effect.is_empty() {
        text += "no license count would change\n";
    }
    text += &columns(
        ["LICENSE", "FROM", "UNTIL", "AGENTS NOW", "THEN"],
        changed.into_iter().map(|row| {
            let [start, end] = [row.start, row.end].map(exact_time);
            [row.license_id.to_string(), start, end, row.before.to_string(), row.after.to_string()]
        }),
    );
    let queued = effect.publications.iter();
    text += &columns(
        ["TO BE PUBLISHED", "EVENTS", "UNITS"],
        queued.map(|row| [row.event_type.clone(), row.events.to_string(), row.units.clone()]),
    );
    text += &columns(
        ["METRIC", "COUNTED OR OBSERVED", "SECONDS"],
        effect.metrics.iter().map(|row| {
            let seconds = row.added_seconds.map_or("-".to_owned(), |seconds| seconds.to_string());
            [row.family.clone(), row.added.to_string(), seconds]
        }),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::Queued;

    /// A license whose usage period contains these numbers of agents.
    fn window(license_id: i32, before: u64, after: u64) -> WindowEffect {
        let (start, end) = ("2025-07-01T00:00:00Z".parse().unwrap(), "2026-07-01T00:00:00Z".parse().unwrap());
        WindowEffect { deployment: uuid::Uuid::nil(), license_id, start, end, before, after }
    }

    #[test]
    fn only_licenses_whose_count_changes_are_shown() {
        let one_of_two = Effect { licenses: vec![window(1, 16, 16), window(2, 16, 19)], ..Effect::default() };
        let text = effect(&one_of_two);
        let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows, [["2", "2025-07-01T00:00:00Z", "2026-07-01T00:00:00Z", "16", "19"]]);

        let none = Effect { licenses: vec![window(1, 16, 16)], ..Effect::default() };
        assert_eq!(effect(&none), "no license count, publication or metric would change\n");

        let seats = Queued { deployment: uuid::Uuid::nil(), event_type: "hb_ai_seats_v1".into(), events: 1, units: "5".into() };
        let other = effect(&Effect { publications: vec![seats], ..none });
        assert!(other.starts_with("no license count would change\n") && other.contains("hb_ai_seats_v1"), "{other}");
    }

    #[test]
    fn a_resumed_replay_says_so() {
        let replayed = |resumed_after| {
            let counts = (40, 30, 7, 1, 1, 1);
            let (records, accepted, duplicates, conflicts, rejects, held) = counts;
            Replayed { hash: String::new(), resumed_after, records, accepted, duplicates, conflicts, rejects, held }
        };
        let counts = "30 new, 7 duplicates, 1 conflicts, 1 rejected, 1 held";
        assert_eq!(sentence(&replayed(None)), format!("40 records read again: {counts}\n"));
        assert_eq!(sentence(&replayed(Some(10))), format!("40 records read again, 10 of them before it was interrupted: {counts}\n"));
    }
}
