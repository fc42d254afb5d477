//! `tallyline replay plan` and `tallyline replay execute`

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;

use super::api::ApiClient;
use super::output::exact_time;
use super::progress::Progress;
use super::via::{Change, Query, Via};
use super::{Context, Exit, Failure, columns};
use crate::api::{PlanState, ShowPlan};
use crate::operations::{
    Effect, LogRange, MovedEnd, ReplayExecution, ReplayPlan, Replayed, WindowEffect,
};

/// Interval of progress queries to the process that executes a plan.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Reread a range of the log.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Replay {
    Plan(Plan),
    Execute(Change<ReplayExecution>),
}

/// Show the effect of a replay, and the hash that identifies the plan when it is executed
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    #[command(flatten)]
    query: Query<LogRange>,
    /// All topics
    #[arg(long)]
    all_topics: bool,
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: ReplayPlan,
    execute: String,
}

pub(super) async fn run(replay: Replay, context: Context) -> Result<Exit, Failure> {
    match replay {
        Replay::Plan(arguments) => plan(arguments.query, &context).await,
        Replay::Execute(change) => execute(change, &context).await,
    }
}

async fn plan(query: Query<LogRange>, context: &Context) -> Result<Exit, Failure> {
    let plan = query.run(context).await?;
    if !plan.moved_ends.is_empty() {
        tracing::warn!("{}", moved(&plan.moved_ends));
    }
    let execute = format!("tallyline replay execute {} --plan {}", query.via.again(), plan.hash);
    let answer = Planned { plan, execute };
    context.output.answer(&answer, || table(&answer))?;
    Ok(Exit::Success)
}

async fn execute(
    Change { via, actor, request }: Change<ReplayExecution>,
    context: &Context,
) -> Result<Exit, Failure> {
    let answer = match via.open(context).await? {
        Via::Handles(handles) => {
            handles
                .watched(async |operations, progress| {
                    operations
                        .execute_replay(&request, &actor.actor(), progress, &context.stop)
                        .await
                })
                .await?
        }
        Via::Api(api) => {
            let progress = Progress::default();
            let executed = over_api(&api, &request, actor.reason_alone()?, &progress);
            // a serving process continues its work
            let executed = context.stop.run_until_cancelled(executed).await;
            progress.finish();
            executed.unwrap_or_else(|| Err(Failure::interrupted()))?
        }
    };
    context.output.answer(&answer, || sentence(&answer))?;
    Ok(Exit::Success)
}

/// Reports moved ends of ranges in one line, for any number of partitions.
fn moved(ends: &[MovedEnd]) -> String {
    let asked: BTreeSet<String> =
        ends.iter().map(|end| format!("--{} {}", end.end, end.asked)).collect();
    let mut held: Vec<String> = ends
        .iter()
        .map(|end| format!("{}/{} {} to {}", end.topic, end.partition, end.log_start, end.log_end))
        .collect();
    held.dedup();
    let asked = asked.into_iter().collect::<Vec<_>>().join(" and ");
    format!(
        "{asked}: not held by every partition, so the nearest offset is taken; the log holds {}",
        held.join(", ")
    )
}

/// The result of the whole plan, including earlier calls.
fn sentence(replayed: &Replayed) -> String {
    let Replayed { resumed_after, records, accepted, duplicates, conflicts, rejects, held, .. } =
        replayed;
    let resumed = resumed_after
        .map(|earlier| format!(", {earlier} of them before it was interrupted"))
        .unwrap_or_default();
    format!(
        "{records} records read again{resumed}: {accepted} new, {duplicates} duplicates, {conflicts} conflicts, {rejects} rejected, {held} held\n"
    )
}

/// Makes a serving process execute the plan, and shows its progress.
async fn over_api(
    api: &ApiClient,
    request: &ReplayExecution,
    reason: &str,
    progress: &Progress,
) -> Result<Replayed, Failure> {
    let mut standing = api.ask(request, reason).await?;
    loop {
        match (standing.state, standing.replayed, standing.problem) {
            (PlanState::Running, ..) => {
                progress.at(
                    (standing.doing.as_deref().unwrap_or("replaying"), "records"),
                    standing.done,
                    standing.total,
                );
                tokio::time::sleep(LOOK_AGAIN).await;
                standing = api.ask(&ShowPlan { hash: request.hash.clone() }, "").await?;
            }
            (_, Some(replayed), _) => return Ok(replayed),
            (_, _, Some(problem)) => {
                return Err(ApiClient::failure(problem.status, &problem.message));
            }
            _ => {
                return Err(Failure::of(
                    Exit::Refused,
                    "the process that executed the plan has ended; run the same command again, it resumes",
                ));
            }
        }
    }
}

fn table(answer: &Planned) -> String {
    let rows = answer.plan.partitions.iter().map(|row| {
        let numbers = [row.first_offset, row.end_offset].map(|offset| offset.to_string());
        let counts = [
            row.records,
            row.new_events,
            row.duplicates,
            row.conflicts,
            row.rejects,
            row.held,
            row.new_refused,
        ];
        let ([first, end], [records, new, duplicates, conflicts, rejects, held, refused]) =
            (numbers, counts.map(|number| number.to_string()));
        [
            row.topic.clone(),
            row.partition.to_string(),
            first,
            end,
            records,
            new,
            duplicates,
            conflicts,
            rejects,
            held,
            refused,
        ]
    });
    let headings = [
        "TOPIC",
        "PARTITION",
        "FROM",
        "UNTIL",
        "RECORDS",
        "NEW",
        "DUPLICATES",
        "CONFLICTS",
        "REJECTED",
        "HELD",
        "NEW TO REJECTS",
    ];
    let ranges = columns(headings, rows);
    format!(
        "{ranges}\n{}\nhash     {}\nexecute  {}\n",
        effect(&answer.plan.effect),
        answer.plan.hash,
        answer.execute
    )
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
    let changed: Vec<&WindowEffect> =
        effect.licenses.iter().filter(|row| row.before != row.after).collect();
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
        let (start, end) =
            ("2025-07-01T00:00:00Z".parse().unwrap(), "2026-07-01T00:00:00Z".parse().unwrap());
        WindowEffect { deployment: uuid::Uuid::nil(), license_id, start, end, before, after }
    }

    #[test]
    fn only_licenses_whose_count_changes_are_shown() {
        let one_of_two =
            Effect { licenses: vec![window(1, 16, 16), window(2, 16, 19)], ..Effect::default() };
        let text = effect(&one_of_two);
        let rows: Vec<Vec<&str>> =
            text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows, [["2", "2025-07-01T00:00:00Z", "2026-07-01T00:00:00Z", "16", "19"]]);

        let none = Effect { licenses: vec![window(1, 16, 16)], ..Effect::default() };
        assert_eq!(effect(&none), "no license count, publication or metric would change\n");

        let seats = Queued {
            deployment: uuid::Uuid::nil(),
            event_type: "hb_ai_seats_v1".into(),
            events: 1,
            units: "5".into(),
        };
        let other = effect(&Effect { publications: vec![seats], ..none });
        assert!(
            other.starts_with("no license count would change\n")
                && other.contains("hb_ai_seats_v1"),
            "{other}"
        );
    }

    #[test]
    fn a_resumed_replay_says_so() {
        let replayed = |resumed_after| {
            let counts = (40, 30, 7, 1, 1, 1);
            let (records, accepted, duplicates, conflicts, rejects, held) = counts;
            Replayed {
                hash: String::new(),
                resumed_after,
                records,
                accepted,
                duplicates,
                conflicts,
                rejects,
                held,
            }
        };
        let counts = "30 new, 7 duplicates, 1 conflicts, 1 rejected, 1 held";
        assert_eq!(sentence(&replayed(None)), format!("40 records read again: {counts}\n"));
        assert_eq!(
            sentence(&replayed(Some(10))),
            format!("40 records read again, 10 of them before it was interrupted: {counts}\n")
        );
    }
}
