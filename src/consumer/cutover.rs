//! From which record on signatures bind: it is recorded when a consumer first has keys.

use tracing::info;

use super::Consumer;
use crate::event::{Topic, TopicPartition};

/// Why a process without keys reads no records that must be signed.
pub(super) const NO_KEYS: &str =
    "the records of this log must be signed, and log.verification_keys is not set here: set it as in the other processes";

/// Where no consumer has had keys yet, records must be signed from where each partition ends now. The claims of other partitions wait meanwhile. A
/// ledger that has lost its cutover since this process saw it was restored from a backup: there records must be signed from its positions.
pub(super) async fn begin(consumer: &Consumer) -> anyhow::Result<()> {
    let (log, ledger) = (&consumer.log, &consumer.ledger);
    let mut seen = consumer.cutover_seen.lock().await;
    if ledger.in_time(ledger.signed_since()).await?.is_none() {
        let mut ends = Vec::new();
        for topic in Topic::ALL {
            for partition in log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                ends.push((partition, if *seen { 0 } else { log.watermarks(partition).await?.1 }));
            }
        }
        ledger.in_time(ledger.begin_signatures(&ends)).await?;
        info!("records appended from now on must be signed");
    }
    *seen = true;
    Ok(())
}
