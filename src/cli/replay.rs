//! `tallyline replay plan` and `tallyline replay execute`

use serde::Serialize;

use super::actor::ActorArguments;
use super::progress::Progress;
use super::roles::Site;
use super::{Context, Exit, Failure, PipelineArguments, columns};
use crate::operations::{Desk, Effect, LogRange, ReplayExecution, ReplayPlan, Step};

/// Read a range of the log again.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Replay {
    /// Show what a replay would do, and the hash under which exactly that is executed
    Plan(Plan),
    /// Execute a plan, or go on with it after an interruption
    Execute(Execute),
}

/// Show what a replay would do.
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    #[command(flatten)]
    pipeline: PipelineArguments,
    #[command(flatten)]
    range: RangeArguments,
}

/// Which part of the log.
#[derive(Clone, Debug, clap::Args)]
struct RangeArguments {
    /// A topic, with all its partitions or with some: NAME or NAME:0,1,2; may be repeated
    #[arg(long, value_name = "NAME[:PARTITIONS]", required_unless_present = "all_topics", conflicts_with = "all_topics")]
    topic: Vec<String>,
    /// All topics
    #[arg(long)]
    all_topics: bool,
    /// Where to begin: earliest, latest, an offset, an instant (2025-07-01T00:00:00.000, UTC unless it says otherwise) or a duration ago (P1DT2H)
    #[arg(long, value_name = "WHERE")]
    from: String,
    /// Where to end, not included: as --from
    #[arg(long, value_name = "WHERE", default_value = "latest")]
    until: String,
}

/// Execute a plan.
#[derive(Clone, Debug, clap::Args)]
pub struct Execute {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// The hash that `tallyline replay plan` printed
    #[arg(long = "plan", value_name = "HASH")]
    hash: String,
    /// Records read again in a second, at most; the default leaves live consumption most of the ledger
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
    let desk = open(&arguments.pipeline, context).await?;
    let RangeArguments { topic: topics, from, until, .. } = arguments.range;
    let (progress, range) = (Progress::of_steps(), LogRange { topics, from, until });
    let planned = desk.plan_replay(&range, |Step { doing, done, total }| progress.at(doing, done, total), &context.stop).await;
    progress.finish();
    let plan = planned?;
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    let execute = format!("tallyline replay execute {} --plan {}", arguments.pipeline.again(), plan.hash);
    let answer = Planned { plan, execute };
    context.output.answer(&answer, || table(&answer))?;
    Ok(Exit::Success)
}

async fn execute(arguments: Execute, context: &Context) -> Result<Exit, Failure> {
    let desk = open(&arguments.pipeline, context).await?;
    let request = ReplayExecution { hash: arguments.hash, records_per_second: Some(arguments.rate) };
    let progress = Progress::of_steps();
    let told = |Step { doing, done, total }| progress.at(doing, done, total);
    let executed = desk.execute_replay(&request, &arguments.actor.actor(), told, &context.stop).await;
    progress.finish();
    let answer = executed?;
    context.output.answer(&answer, || {
        let numbers = [answer.accepted, answer.duplicates, answer.conflicts, answer.rejects, answer.held].map(|number| number.to_string());
        let [accepted, duplicates, conflicts, rejects, held] = numbers;
        format!(
            "{} records read again: {accepted} new, {duplicates} duplicates, {conflicts} conflicts, {rejects} rejected, {held} held\n",
            answer.records
        )
    })?;
    Ok(Exit::Success)
}

/// Ledger and log, both reached.
async fn open(pipeline: &PipelineArguments, context: &Context) -> Result<Desk, Failure> {
    let site = Site::open(pipeline.load()?, context.clock.clone()).await?;
    let reached = async {
        site.ledger.reach().await?;
        site.log.reach().await
    };
    context.stop.run_until_cancelled(reached).await.unwrap_or_else(|| Err(Failure::interrupted()))?;
    site.desk()
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

/// What the new events would change, for reading.
fn effect(effect: &Effect) -> String {
    let mut text = String::new();
    if effect.is_empty() {
        text += "no license count, publication or metric would change\n";
    }
    for deployment in &effect.introduced {
        text += &format!("deployment {deployment} would be introduced\n");
    }
    text += &columns(
        ["LICENSE", "FROM", "UNTIL", "AGENTS NOW", "THEN"],
        effect.licenses.iter().map(|row| {
            let instants = [row.start, row.end].map(|instant| instant.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true));
            let [start, end] = instants;
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
