//! `tallyline replay plan` and `tallyline replay execute`

use serde::Serialize;

use super::progress::Progress;
use super::ranges::RangeArguments;
use super::{Context, Exit, Failure, PipelineArguments, columns, connect};
use crate::config::Pipeline;
use crate::consumer;
use crate::ledger::{Counts, ReplayRange};

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

/// Execute a plan.
#[derive(Clone, Debug, clap::Args)]
pub struct Execute {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// The hash that `tallyline replay plan` printed
    #[arg(long = "plan", value_name = "HASH")]
    hash: String,
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: consumer::Plan,
    execute: String,
}

#[derive(Serialize)]
struct Executed {
    hash: String,
    records: i32,
    accepted: i32,
    duplicates: i32,
    conflicts: i32,
    rejects: i32,
    held: i32,
}

pub(super) async fn run(replay: Replay, context: Context) -> Result<Exit, Failure> {
    match replay {
        Replay::Plan(arguments) => {
            let stop = context.stop.clone();
            super::until_stopped(&stop, plan(arguments, &context)).await
        }
        Replay::Execute(arguments) => execute(arguments, &context).await,
    }
}

async fn plan(arguments: Plan, context: &Context) -> Result<Exit, Failure> {
    let pipeline = arguments.pipeline.load()?;
    let replay = open(&pipeline, context).await?;
    let (ranges, notes) = arguments.range.resolve(&replay.log, &replay.ledger, &pipeline.kafka.topic_prefix).await?;
    for note in notes {
        tracing::warn!("{note}");
    }
    let progress = Progress::new("planning", total(&ranges));
    let planned = replay.plan(&ranges, |records| progress.add(records)).await;
    progress.finish();
    let plan = planned?;
    let execute = format!("tallyline replay execute {} --plan {}", arguments.pipeline.again(), plan.hash);
    let answer = Planned { plan, execute };
    context.output.answer(&answer, || table(&answer))?;
    Ok(Exit::Success)
}

async fn execute(arguments: Execute, context: &Context) -> Result<Exit, Failure> {
    let pipeline = arguments.pipeline.load()?;
    let opened = open(&pipeline, context);
    let replay = context.stop.run_until_cancelled(opened).await.unwrap_or_else(|| Err(Failure::interrupted()))?;
    let left = match replay.ledger.load_replay(&arguments.hash).await? {
        Some((_, _, ranges)) => total(&ranges),
        None => 0,
    };
    let progress = Progress::new("replaying", left);
    let executed = replay.execute(&arguments.hash, |records| progress.add(records), &context.stop).await;
    progress.finish();
    let Counts { records, accepted, duplicates, conflicts, rejects, held } = executed?;
    let answer = Executed { hash: arguments.hash, records, accepted, duplicates, conflicts, rejects, held };
    context.output.answer(&answer, || {
        format!("{records} records read again: {accepted} new, {duplicates} duplicates, {conflicts} conflicts, {rejects} rejected, {held} held\n")
    })?;
    Ok(Exit::Success)
}

async fn open(pipeline: &Pipeline, context: &Context) -> Result<consumer::Replay, Failure> {
    let ledger = connect::open_ledger(pipeline, context.clock.clone()).await?;
    let log = connect::open_log(pipeline, &ledger).await?;
    ledger.reach().await?;
    log.reach().await?;
    Ok(consumer::Replay { log: log.log, ledger: ledger.ledger })
}

/// Offsets still to be read: Kafka's may have gaps, then it is less.
fn total(ranges: &[ReplayRange]) -> u64 {
    ranges.iter().map(|range| u64::try_from(range.end_offset - range.next_offset).unwrap_or_default()).sum()
}

fn table(answer: &Planned) -> String {
    let rows = answer.plan.partitions.iter().map(|row| {
        let numbers = [row.records, row.new_events, row.duplicates, row.conflicts, row.rejects, row.held].map(|number| number.to_string());
        let [records, new, duplicates, conflicts, rejects, held] = numbers;
        let (first, end) = (row.first_offset.to_string(), row.end_offset.to_string());
        [row.topic.to_owned(), row.partition.to_string(), first, end, records, new, duplicates, conflicts, rejects, held]
    });
    let headings = ["TOPIC", "PARTITION", "FROM", "UNTIL", "RECORDS", "NEW", "DUPLICATES", "CONFLICTS", "REJECTED", "HELD"];
    format!("{}hash     {}\nexecute  {}\n", columns(headings, rows), answer.plan.hash, answer.execute)
}
