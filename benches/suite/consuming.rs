//! The intake side: a consumer as in `tallyline run` with the role `consume`. Its own process makes
//! its memory measurable.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use prometheus::Registry;
use serde::{Deserialize, Serialize};
use tallyline::clock::Clock;
use tallyline::consumer::{Consumer, ConsumerTelemetry};
use tallyline::ledger::{Ledger, LedgerSettings};
use tallyline::log::{KafkaSettings, Log};
use tokio_util::sync::CancellationToken;

use crate::process::own_peak_kib;

/// The source and the target of the consumer.
#[derive(Serialize, Deserialize)]
pub struct Consuming {
    /// PostgreSQL URL of an empty ledger.
    pub ledger: String,
    /// `bootstrap.servers`.
    pub brokers: String,
    /// Put before topic and group names.
    pub prefix: String,
    /// The consumer group.
    pub group: String,
    /// The number of events in the log.
    pub events: u32,
}

/// The measurements of the process.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Consumed {
    /// From the start to the first batch in the ledger: connections, joining the group, the first
    /// fetch and the first commit.
    pub first_batch_seconds: f64,
    /// From the start until every event is committed.
    pub seconds: f64,
    /// The process's peak memory, `VmHWM`, in KiB.
    pub peak_kib: u64,
}

/// Longer than any machine takes: after this the consumer hangs.
const DEADLINE: Duration = Duration::from_secs(900);
/// Interval of reading the consumer's counters.
const READ_INTERVAL: Duration = Duration::from_millis(5);

/// Consumes until every event is in the ledger, then reports on stdout.
pub async fn consume(consuming: &Consuming) -> Result<()> {
    let begun = Instant::now();
    let settings = KafkaSettings {
        topic_prefix: consuming.prefix.clone(),
        ..KafkaSettings::new(&consuming.brokers)
    };
    // more connections than a pipeline of any roles has by default
    let ledger = Ledger::open(
        &LedgerSettings { url: consuming.ledger.clone(), connections: 16 },
        Clock::system(),
    )?;
    let registry = Registry::new();
    let telemetry = ConsumerTelemetry::register(&registry)?;
    let consumer = Consumer::new(Log::kafka(settings)?, ledger, &consuming.group, telemetry);
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (consumer, stop) = (consumer.clone(), stop.clone());
        async move { consumer.run(&stop).await }
    });
    let mut first_batch = None;
    let seconds = loop {
        let recorded = recorded(&registry);
        if recorded > 0.0 {
            first_batch.get_or_insert(begun.elapsed());
        }
        if recorded >= f64::from(consuming.events) {
            break begun.elapsed().as_secs_f64();
        }
        if begun.elapsed() > DEADLINE {
            bail!("{recorded} of {} events after {DEADLINE:?}", consuming.events);
        }
        tokio::time::sleep(READ_INTERVAL).await;
    };
    stop.cancel();
    running.await?;
    let first_batch_seconds = first_batch.unwrap_or_default().as_secs_f64();
    let consumed = Consumed { first_batch_seconds, seconds, peak_kib: own_peak_kib()? };
    serde_json::to_writer(std::io::stdout(), &consumed)?;
    Ok(())
}

/// Records of committed batches, with any disposition.
fn recorded(registry: &Registry) -> f64 {
    let families = registry.gather();
    let records =
        families.iter().filter(|family| family.name() == "tallyline_consumer_records_total");
    records.flat_map(|family| family.get_metric()).map(|metric| metric.get_counter().value()).sum()
}
