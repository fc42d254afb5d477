//! `tallyline status`

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use super::{Context, Exit, Failure, PipelineArguments, columns, connect};
use crate::status::{self, Status};

/// How long the log may take to tell its ends.
const LOG_ANSWER: Duration = Duration::from_secs(60);

/// Show where everything stands.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
}

#[derive(Serialize)]
struct Answer {
    at: DateTime<Utc>,
    #[serde(flatten)]
    status: Status,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let pipeline = arguments.pipeline.load()?;
    let ledger = connect::open_ledger(&pipeline, context.clock.clone()).await?;
    let log = connect::open_log(&pipeline, &ledger).await?;
    ledger.reach().await?;
    let mut status = status::read(&ledger.ledger, &log.log, LOG_ANSWER).await?;
    status.log_problem = status.log_problem.map(|problem| format!("{}: {problem}", log.address));
    let answer = Answer { at: context.clock.now(), status };
    context.output.answer(&answer, || table(&answer))?;
    match &answer.status.log_problem {
        None => Ok(Exit::Success),
        Some(problem) => Err(Failure::of(Exit::Unreachable, format!("the lag is not known: {problem}"))),
    }
}

fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

fn table(answer: &Answer) -> String {
    let Answer { at, status } = answer;
    let number = |value: Option<i64>| or_dash(value, |number| number.to_string());
    let partitions = status.partitions.iter().map(|row| {
        let ends = [row.position, row.log_end, row.lag].map(number);
        let [position, end, lag] = ends;
        [row.topic.clone(), row.partition.to_string(), position, end, lag, or_dash(row.moved_at, time)]
    });
    let batches = status.batches.iter().map(|row| {
        let [batches, records, accepted, duplicates] =
            [row.batches, row.records, row.accepted, row.duplicates].map(|count| count.to_string());
        [row.kind.clone(), batches, records, accepted, duplicates, time(row.last_recorded_at)]
    });
    let events = status.events.iter().map(|row| [row.deployment_id.to_string(), row.event_type.clone(), row.events.to_string()]);
    let refused = status.refused.iter().map(|row| [row.verdict.clone(), row.cause.clone(), row.records.to_string()]);
    let sources = status.sources.iter().map(|row| {
        let collected = if row.collected { "yes" } else { "no" }.to_owned();
        let complete = [row.complete_until, row.runtime_complete_until].map(|until| or_dash(until, time));
        let [complete, runtime] = complete;
        [row.deployment_id.to_string(), collected, time(row.introduced_at), complete, runtime]
    });
    let publications = status.publications.iter().map(|row| {
        let [events, unanswered] = [row.events, row.unanswered].map(|count| count.to_string());
        [row.deployment_id.to_string(), row.state.clone(), events, unanswered, time(row.oldest_created_at)]
    });
    let leases = status.leases.iter().map(|row| {
        let holder = if row.held { row.holder.clone() } else { "nobody".to_owned() };
        [row.name.clone(), holder, row.epoch.to_string(), time(row.expires_at)]
    });
    let tables = [
        columns(["TOPIC", "PARTITION", "POSITION", "LOG END", "LAG", "MOVED AT"], partitions),
        columns(["BATCHES", "COUNT", "RECORDS", "ACCEPTED", "DUPLICATES", "LAST AT"], batches),
        columns(["DEPLOYMENT", "EVENT TYPE", "EVENTS"], events),
        columns(["REFUSED", "CAUSE", "RECORDS"], refused),
        columns(["DEPLOYMENT", "COLLECTED", "INTRODUCED AT", "COMPLETE UNTIL", "RUNTIME COMPLETE UNTIL"], sources),
        columns(["DEPLOYMENT", "PUBLICATION", "EVENTS", "UNANSWERED", "OLDEST"], publications),
        columns(["LEASE", "HELD BY", "EPOCH", "UNTIL"], leases),
    ];
    let head = format!("ledger {} at sequence {}, {}\n", status.ledger_incarnation, status.ledger_sequence, time(*at));
    let head = status.recovering.iter().fold(head, |head, recovering| format!("{head}{recovering}\n"));
    tables.into_iter().filter(|table| !table.is_empty()).fold(head, |text, table| format!("{text}\n{table}"))
}
