//! The speed of events from Kafka into the ledger, and the memory for it. It is compared with the
//! fastest way to bring the same rows into the same tables. benches/README.md has the command and
//! the figures.

mod consuming;
mod events;
mod limit;
mod parsing;
mod report;

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tallyline::clock::Clock;
use tallyline::event::Topic;
use tallyline::ledger::{Ledger, LedgerSettings, sources};
use tallyline::log::{KafkaSettings, Log};
use uuid::Uuid;

use consuming::Consuming;
use report::{Pair, Size};

/// The default number of a pipeline.
const PARTITIONS: i32 = 6;
/// Events that are made, written to Kafka and dropped in one step.
const CHUNK: usize = 10_000;
/// Events of the first round, which is not measured.
const WARM_UP: u32 = 5_000;

/// Run it by `scripts/with-servers cargo bench --bench intake`.
#[derive(Parser)]
struct Options {
    /// How many events; may be given several times. Memory is compared between the first and the
    /// last.
    #[arg(long = "events", default_values_t = [200_000, 1_000_000])]
    sizes: Vec<u32>,
    /// How often each side is measured at each size.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where to consume: the intake side runs in a process of its own, which is this program again.
    #[arg(long, hide = true)]
    consume: Option<String>,
    /// `cargo bench` passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    match &options.consume {
        Some(consuming) => runtime.block_on(consuming::consume(&serde_json::from_str(consuming)?)),
        None => runtime.block_on(measure(&options)),
    }
}

async fn measure(options: &Options) -> Result<()> {
    let server = setting("TALLYLINE_TEST_POSTGRES")?;
    let brokers = setting("TALLYLINE_TEST_KAFKA")?;
    report::surroundings(&server).await?;
    parsing::measure();
    // the first group on the broker waits until the topic of groups' offsets exists
    let prefix = prefix();
    let rows = fill(&brokers, &prefix, WARM_UP).await?;
    pair(&server, &brokers, &prefix, WARM_UP, &rows, 0).await?;
    let mut sizes = Vec::new();
    for events in &options.sizes {
        let prefix = self::prefix();
        let rows = fill(&brokers, &prefix, *events).await?;
        let mut pairs = Vec::new();
        for round in 0..options.rounds {
            let pair = pair(&server, &brokers, &prefix, *events, &rows, round).await?;
            report::pair(round, &pair);
            pairs.push(pair);
        }
        sizes.push(Size { events: *events, pairs });
    }
    report::summary(&sizes);
    Ok(())
}

fn setting(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| {
        format!("{name} is not set: run scripts/with-servers cargo bench --bench intake")
    })
}

/// Separates one size's topics and groups from all others.
fn prefix() -> String {
    format!("bench{}.", Uuid::new_v4().simple())
}

/// Writes the events to a new topic and keeps the rows for `COPY`.
async fn fill(brokers: &str, prefix: &str, events: u32) -> Result<limit::Rows> {
    let settings = KafkaSettings {
        topic_prefix: prefix.to_owned(),
        replication: 1,
        ..KafkaSettings::new(brokers)
    };
    let log = Log::kafka(settings)?;
    log.create_topics(PARTITIONS).await?;
    let mut rows = limit::Rows::default();
    let numbers: Vec<u32> = (0..events).collect();
    for chunk in numbers.chunks(CHUNK) {
        let events: Vec<_> = chunk.iter().map(|number| events::event(*number)).collect();
        let messages = events.iter().map(tallyline::event::Event::to_message).collect();
        let placed = log.append(Topic::WorkspaceBuilds, messages).await?;
        rows.add(&events, &placed);
    }
    Ok(rows)
}

/// Measures both sides once, each in a fresh ledger; the order alternates.
async fn pair(
    server: &str,
    brokers: &str,
    prefix: &str,
    events: u32,
    rows: &limit::Rows,
    round: usize,
) -> Result<Pair> {
    let mut consumed = None;
    let mut copied = None;
    for intake in if round.is_multiple_of(2) { [true, false] } else { [false, true] } {
        let (name, url) = fresh_ledger(server).await?;
        if intake {
            let group = format!("round-{round}");
            let consuming = Consuming {
                ledger: url.clone(),
                brokers: brokers.to_owned(),
                prefix: prefix.to_owned(),
                group,
                events,
            };
            consumed =
                Some((consuming::in_a_process_of_its_own(&consuming)?, contents(&url).await?));
        } else {
            let begun = Instant::now();
            limit::copy_then_insert(&url, rows).await?;
            copied = Some((begun.elapsed().as_secs_f64(), contents(&url).await?));
        }
        let mut admin = PgConnection::connect(server).await?;
        sqlx::query(AssertSqlSafe(format!("drop database {name} with (force)")))
            .execute(&mut admin)
            .await?;
    }
    let ((consumed, by_intake), (copy_seconds, by_copy)) =
        consumed.zip(copied).context("both sides were measured")?;
    ensure!(by_intake == by_copy, "the two sides wrote different rows: {by_intake:?}, {by_copy:?}");
    ensure!(by_intake.0 == i64::from(events), "{} rows of {events} events", by_intake.0);
    Ok(Pair { consumed, copy_seconds })
}

/// A database with this version's migrations. A checkpoint before it keeps the writes of one side
/// out of the other's time.
async fn fresh_ledger(server: &str) -> Result<(String, String)> {
    let name = format!("bench_{}", Uuid::new_v4().simple());
    let (address, _) =
        server.rsplit_once('/').context("the server's address ends in a database name")?;
    let url = format!("{address}/{name}");
    let mut admin = PgConnection::connect(server).await?;
    sqlx::query(AssertSqlSafe(format!("create database {name}"))).execute(&mut admin).await?;
    let ledger =
        Ledger::open(&LedgerSettings { url: url.clone(), connections: 2 }, Clock::system())?;
    ledger.migrate().await?;
    // events of unregistered deployments are held
    ledger
        .run(async |conn| {
            sources::register(
                conn,
                events::DEPLOYMENT,
                Clock::system().now(),
                None,
                ledger.clock.now(),
            )
            .await
        })
        .await?;
    ledger.pool.close().await;
    sqlx::query("checkpoint").execute(&mut admin).await?;
    Ok((name, url))
}

/// The content that both sides must share: the numbers of builds and first starts, and a sum over
/// all event columns.
async fn contents(url: &str) -> Result<(i64, i64, String)> {
    let mut connection = PgConnection::connect(url).await?;
    Ok(sqlx::query_as(
        "select count(*), (select count(*) from workspace_first_start),
             sum(hashtextextended((to_jsonb(b) - 'batch_id')::text, 0)::numeric)::text from workspace_build b",
    )
    .fetch_one(&mut connection)
    .await?)
}
