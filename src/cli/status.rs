//! `tallyline status`

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::{Context, Exit, Failure, PipelineArguments, columns, connect};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{BatchCount, Contents, EventCount, LeaseRow, Ledger, PositionRow, PublicationCount, RefusedCount, SourceRow};
use crate::log::{Log, LogError};

/// Show where everything stands.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
}

#[derive(Serialize)]
struct Answer {
    at: DateTime<Utc>,
    ledger_incarnation: Uuid,
    ledger_sequence: i64,
    /// Why the log's ends are not known, if so.
    log_problem: Option<String>,
    partitions: Vec<Partition>,
    batches: Vec<BatchCount>,
    events: Vec<EventCount>,
    refused: Vec<RefusedCount>,
    sources: Vec<Source>,
    publications: Vec<PublicationCount>,
    leases: Vec<LeaseRow>,
}

/// A partition that the log or the ledger knows.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Partition {
    topic: String,
    partition: i32,
    /// The offset to read next; none before it was ever assigned.
    position: Option<i64>,
    log_start: Option<i64>,
    log_end: Option<i64>,
    /// Offsets behind the log's end. None where one of the two is not known, or where the position is not in the log.
    lag: Option<i64>,
    moved_at: Option<DateTime<Utc>>,
}

#[derive(Serialize)]
struct Source {
    deployment_id: Uuid,
    collected: bool,
    introduced_at: DateTime<Utc>,
    baseline_until: Option<DateTime<Utc>>,
    complete_until: Option<DateTime<Utc>>,
    runtime_complete_until: Option<DateTime<Utc>>,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let pipeline = arguments.pipeline.load()?;
    let ledger = connect::open_ledger(&pipeline, context.clock.clone()).await?;
    let log = connect::open_log(&pipeline, &ledger).await?;
    ledger.reach().await?;
    // the log's ends first, so that the ledger is never shown ahead of the log only because it was read later
    let (ends, log_problem) = match ends(&log.log).await {
        Ok(ends) => (ends, None),
        Err(error) => (Vec::new(), Some(format!("{}: {error}", log.address))),
    };
    let contents = ledger.ledger.contents().await?;
    let sources = sources(&ledger.ledger, &contents.sources).await?;
    let answer = answer(contents, sources, &ends, log_problem, context.clock.now());
    context.output.answer(&answer, || table(&answer))?;
    match &answer.log_problem {
        None => Ok(Exit::Success),
        Some(problem) => Err(Failure::of(Exit::Unreachable, format!("the lag is not known: {problem}"))),
    }
}

/// Each partition's first and next offset.
async fn ends(log: &Log) -> Result<Vec<(TopicPartition, i64, i64)>, LogError> {
    let mut ends = Vec::new();
    for topic in Topic::ALL {
        for partition in log.partitions(topic).await? {
            let partition = TopicPartition { topic, partition };
            let (start, end) = log.watermarks(partition).await?;
            ends.push((partition, start, end));
        }
    }
    Ok(ends)
}

async fn sources(ledger: &Ledger, rows: &[SourceRow]) -> Result<Vec<Source>, Failure> {
    let mut sources = Vec::with_capacity(rows.len());
    for row in rows {
        let complete = ledger.completeness(row.id).await?;
        sources.push(Source {
            deployment_id: row.deployment_id,
            collected: row.collected,
            introduced_at: row.introduced_at,
            baseline_until: row.baseline_until,
            complete_until: complete.complete_until,
            runtime_complete_until: complete.runtime_complete_until,
        });
    }
    Ok(sources)
}

fn answer(
    contents: Contents,
    sources: Vec<Source>,
    ends: &[(TopicPartition, i64, i64)],
    log_problem: Option<String>,
    at: DateTime<Utc>,
) -> Answer {
    Answer {
        at,
        ledger_incarnation: contents.incarnation,
        ledger_sequence: contents.sequence,
        log_problem,
        partitions: partitions(&contents.positions, ends),
        batches: contents.batches,
        events: contents.events,
        refused: contents.refused,
        sources,
        publications: contents.publications,
        leases: contents.leases,
    }
}

/// What the log has, then positions in partitions that it does not have.
fn partitions(positions: &[PositionRow], ends: &[(TopicPartition, i64, i64)]) -> Vec<Partition> {
    let of = |topic: &str, partition: i32| positions.iter().find(|row| row.topic == topic && row.partition == partition);
    let in_log = |row: &PositionRow| ends.iter().any(|(at, ..)| at.topic.name() == row.topic && at.partition == row.partition);
    let mut partitions: Vec<Partition> = ends
        .iter()
        .map(|(at, start, end)| {
            let row = of(at.topic.name(), at.partition);
            let position = row.map(|row| row.next_offset);
            // what was never assigned is read from the log's start
            let lag = Some(position.unwrap_or(*start)).filter(|next| (start..=end).contains(&next)).map(|next| end - next);
            let (topic, moved_at) = (at.topic.name().to_owned(), row.map(|row| row.moved_at));
            Partition { topic, partition: at.partition, position, log_start: Some(*start), log_end: Some(*end), lag, moved_at }
        })
        .collect();
    partitions.extend(positions.iter().filter(|row| !in_log(row)).map(|row| Partition {
        topic: row.topic.clone(),
        partition: row.partition,
        position: Some(row.next_offset),
        log_start: None,
        log_end: None,
        lag: None,
        moved_at: Some(row.moved_at),
    }));
    partitions
}

fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

fn table(answer: &Answer) -> String {
    let number = |value: Option<i64>| or_dash(value, |number| number.to_string());
    let partitions = answer.partitions.iter().map(|row| {
        let ends = [row.position, row.log_end, row.lag].map(number);
        let [position, end, lag] = ends;
        [row.topic.clone(), row.partition.to_string(), position, end, lag, or_dash(row.moved_at, time)]
    });
    let batches = answer.batches.iter().map(|row| {
        let [batches, records, accepted, duplicates] =
            [row.batches, row.records, row.accepted, row.duplicates].map(|count| count.to_string());
        [row.kind.clone(), batches, records, accepted, duplicates, time(row.last_recorded_at)]
    });
    let events = answer.events.iter().map(|row| [row.deployment_id.to_string(), row.event_type.clone(), row.events.to_string()]);
    let refused = answer.refused.iter().map(|row| [row.verdict.clone(), row.cause.clone(), row.records.to_string()]);
    let sources = answer.sources.iter().map(|row| {
        let collected = if row.collected { "yes" } else { "no" }.to_owned();
        let complete = [row.complete_until, row.runtime_complete_until].map(|until| or_dash(until, time));
        let [complete, runtime] = complete;
        [row.deployment_id.to_string(), collected, time(row.introduced_at), complete, runtime]
    });
    let publications = answer.publications.iter().map(|row| {
        let [events, unanswered] = [row.events, row.unanswered].map(|count| count.to_string());
        [row.deployment_id.to_string(), row.state.clone(), events, unanswered, time(row.oldest_created_at)]
    });
    let leases = answer.leases.iter().map(|row| {
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
    let head = format!("ledger {} at sequence {}, {}\n", answer.ledger_incarnation, answer.ledger_sequence, time(answer.at));
    tables.into_iter().filter(|table| !table.is_empty()).fold(head, |text, table| format!("{text}\n{table}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_told_where_it_is_known() {
        let at = |partition| TopicPartition { topic: Topic::AgentUsage, partition };
        let moved_at = DateTime::UNIX_EPOCH;
        let row =
            |partition, next_offset| PositionRow { topic: Topic::AgentUsage.name().into(), partition, next_offset, epoch: 1, moved_at };
        let ends = [(at(0), 5, 20), (at(1), 5, 20), (at(2), 5, 20), (at(3), 5, 20)];
        // within the log, never assigned, fallen out of the log, beyond its end, and of a partition that is not there
        let lags: Vec<(i32, Option<i64>, Option<i64>)> = partitions(&[row(0, 18), row(2, 4), row(3, 21), row(9, 1)], &ends)
            .iter()
            .map(|partition| (partition.partition, partition.position, partition.lag))
            .collect();
        assert_eq!(lags, [(0, Some(18), Some(2)), (1, None, Some(15)), (2, Some(4), None), (3, Some(21), None), (9, Some(1), None)]);
    }
}
