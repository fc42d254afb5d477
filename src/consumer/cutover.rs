//! From which record on signatures bind: it is recorded when a consumer first has keys.

use tracing::info;

use crate::event::{Topic, TopicPartition};
use crate::ledger::Ledger;
use crate::log::Log;

/// Why a process without keys reads no records that must be signed.
pub(super) const NO_KEYS: &str =
    "the records of this log must be signed, and log.verification_keys is not set here: set it as in the other processes";

/// Where no consumer has had keys yet, records must be signed from where each partition ends now.
pub(super) async fn begin(log: &Log, ledger: &Ledger) -> anyhow::Result<()> {
    if ledger.in_time(ledger.signed_since()).await?.is_some() {
        return Ok(());
    }
    let mut ends = Vec::new();
    for topic in Topic::ALL {
        for partition in log.partitions(topic).await? {
            let partition = TopicPartition { topic, partition };
            ends.push((partition, log.watermarks(partition).await?.1));
        }
    }
    ledger.in_time(ledger.begin_signatures(&ends)).await?;
    info!("records appended from now on must be signed");
    Ok(())
}
