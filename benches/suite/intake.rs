//! Row `intake`: events from Kafka into the ledger, against the fastest way to bring the same rows
//! into the same tables. Rows `replay` and `chain` use its parts.

use std::time::Instant;

use anyhow::{Result, ensure};
use tallyline::event::{Event, Topic};
use tallyline::ledger::sources;
use tallyline::log::{KafkaSettings, Log};
use uuid::Uuid;

use crate::consuming::{Consumed, Consuming};
use crate::report::{Goal, Line, median};
use crate::servers::{Database, Servers};
use crate::{Suite, Task, events, limit, process};

/// The default number of a pipeline.
const PARTITIONS: i32 = 6;
/// Events that are made, written to Kafka and dropped in one step.
const CHUNK: usize = 10_000;
/// Events of the first round, which is not measured.
const WARM_UP: u32 = 5_000;

/// Events of one topic, and the same as rows for `COPY`.
pub struct Filled {
    pub prefix: String,
    pub events: u32,
    pub rows: limit::Rows,
}

/// One round at one size.
struct Pair {
    consumed: Consumed,
    copy_seconds: f64,
}

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let servers = &suite.servers;
    warm_up(servers).await?;
    let (mut lines, mut peaks) = (Vec::new(), Vec::new());
    for (events, rounds) in [(suite.size(200_000, 20_000), 3), (suite.size(1_000_000, 40_000), 1)] {
        let filled = Filled::new(servers, events).await?;
        let mut pairs = Vec::new();
        for round in 0..rounds {
            pairs.push(pair(servers, &filled, round).await?);
        }
        let rate = |seconds: fn(&Pair) -> f64| {
            median(pairs.iter().map(|pair| f64::from(events) / seconds(pair)))
        };
        let limit = (rate(|pair| pair.copy_seconds), "COPY and one insert");
        let intake = rate(|pair| pair.consumed.seconds);
        let rest: Vec<f64> = pairs.iter().map(|pair| pair.consumed.first_batch_seconds).collect();
        let note = format!("first batch after {rest:.2?} s, which is the group's formation");
        let row = format!("intake, {events} events");
        lines.push(Line::ratio(row, intake, "events/s", limit, Goal::AtLeast(0.8)).with(note));
        peaks.push(median(pairs.iter().map(|pair| pair.consumed.peak_kib as f64 / 1024.0)));
    }
    let limit = (peaks[0], "at the smaller size");
    lines.push(Line::ratio("intake, peak memory", peaks[1], "MiB", limit, Goal::AtMost(1.2)));
    Ok(lines)
}

/// The first group on the broker waits until the topic of groups' offsets exists.
pub async fn warm_up(servers: &Servers) -> Result<()> {
    let filled = Filled::new(servers, WARM_UP).await?;
    let ledger = registered_ledger(servers).await?;
    filled.consume(servers, &ledger, "warm-up")?;
    servers.remove(&ledger).await
}

impl Filled {
    /// Writes the events to a new topic.
    pub async fn new(servers: &Servers, events: u32) -> Result<Filled> {
        // separates one size's topics and groups from all others
        let prefix = format!("bench{}.", Uuid::new_v4().simple());
        log(servers, &prefix)?.create_topics(PARTITIONS).await?;
        let mut filled = Filled { prefix, events, rows: limit::Rows::default() };
        filled.rows = filled.append(servers).await?;
        Ok(filled)
    }

    /// Appends all events, and returns them as rows.
    pub async fn append(&self, servers: &Servers) -> Result<limit::Rows> {
        let (log, mut rows) = (log(servers, &self.prefix)?, limit::Rows::default());
        let numbers: Vec<u32> = (0..self.events).collect();
        for chunk in numbers.chunks(CHUNK) {
            let events: Vec<_> = chunk.iter().map(|number| events::event(*number)).collect();
            let messages = events.iter().map(Event::to_message).collect();
            let placed = log.append(Topic::WorkspaceBuilds, messages).await?;
            rows.add(&events, &placed);
        }
        Ok(rows)
    }

    /// Consumes all events in a process of its own.
    pub fn consume(&self, servers: &Servers, ledger: &Database, group: &str) -> Result<Consumed> {
        process::in_a_process_of_its_own(&Task::Consume(Consuming {
            ledger: ledger.url.clone(),
            brokers: servers.brokers.clone(),
            prefix: self.prefix.clone(),
            group: group.to_owned(),
            events: self.events,
        }))
    }
}

pub fn log(servers: &Servers, prefix: &str) -> Result<Log> {
    let settings = KafkaSettings {
        topic_prefix: prefix.to_owned(),
        replication: 1,
        ..KafkaSettings::new(&servers.brokers)
    };
    Ok(Log::kafka(settings)?)
}

/// A ledger in which the events' deployment is registered: other events are held.
pub async fn registered_ledger(servers: &Servers) -> Result<Database> {
    let database = servers.ledger().await?;
    let ledger = database.open(2)?;
    let now = ledger.clock.now();
    ledger
        .run(async |conn| sources::register(conn, events::DEPLOYMENT, now, None, now).await)
        .await?;
    ledger.pool.close().await;
    servers.checkpoint().await?;
    Ok(database)
}

/// Measures both sides once, each in a fresh ledger; the order alternates.
async fn pair(servers: &Servers, filled: &Filled, round: usize) -> Result<Pair> {
    let (mut by_intake, mut by_copy) = (None, None);
    for intake in if round.is_multiple_of(2) { [true, false] } else { [false, true] } {
        let ledger = registered_ledger(servers).await?;
        if intake {
            let consumed = filled.consume(servers, &ledger, &format!("round-{round}"))?;
            by_intake = Some((consumed, contents(&ledger).await?));
        } else {
            let begun = Instant::now();
            limit::copy_then_insert(&ledger.url, &filled.rows).await?;
            by_copy = Some((begun.elapsed().as_secs_f64(), contents(&ledger).await?));
        }
        servers.remove(&ledger).await?;
    }
    let (Some((consumed, one)), Some((copy_seconds, other))) = (by_intake, by_copy) else {
        anyhow::bail!("one side was not measured");
    };
    ensure!(one == other, "the two sides wrote different rows: {one:?}, {other:?}");
    ensure!(one.0 == i64::from(filled.events), "{} rows of {} events", one.0, filled.events);
    Ok(Pair { consumed, copy_seconds })
}

/// The content that both sides must share: the numbers of builds and first starts, and a sum over
/// all event columns.
async fn contents(ledger: &Database) -> Result<(i64, i64, String)> {
    let mut connection = ledger.connect().await?;
    Ok(sqlx::query_as(
        "select count(*), (select count(*) from workspace_first_start),
             sum(hashtextextended((to_jsonb(b) - 'batch_id')::text, 0)::numeric)::text from workspace_build b",
    )
    .fetch_one(&mut connection)
    .await?)
}
