//! Records the signature cutover when a consumer first has keys.

use tracing::info;

use super::Consumer;
use crate::event::{Topic, TopicPartition};
use crate::ledger::cutover;

/// The reason why a process without keys does not read records that must be signed.
pub(super) const NO_KEYS: &str = "log.verification_keys is not set, but the records of this log must be signed: set it as in the other processes";

/// Sets the cutover to each partition's current end, if no consumer has had keys yet. Partitions
/// that are being started wait for this. If this process saw a cutover that the ledger now lacks,
/// the ledger is restored: its cutovers are its positions.
pub(super) async fn begin(consumer: &Consumer) -> anyhow::Result<()> {
    let (log, ledger) = (&consumer.log, &consumer.ledger);
    let mut seen = consumer.cutover_seen.lock().await;
    if ledger.run(cutover::signed_since).await?.is_none() {
        let mut ends = Vec::new();
        for topic in Topic::ALL {
            for partition in log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                ends.push((partition, if *seen { 0 } else { log.watermarks(partition).await?.1 }));
            }
        }
        ledger.run(async |conn| cutover::begin(conn, &ends, ledger.clock.now()).await).await?;
        info!("records appended from now on must be signed");
    }
    *seen = true;
    Ok(())
}
