//! Compares log and ledger. A partition's batches form a chain. Each record is accepted, duplicate,
//! conflict, rejected or held. The log is still the one that was read.

use super::joint::{Audit, Joint, LOG};
use super::step::{self, Item, Step};
use super::vendor;
use crate::event::Topic;
use crate::ledger::{Difference, LedgerBooks, PartitionBooks, fingerprint};

pub(super) async fn compare(audit: &Audit, books: &LedgerBooks) -> anyhow::Result<Joint> {
    let mut joint = Joint::new(LOG);
    let sum = |of: fn(&PartitionBooks) -> i64| books.partitions.iter().map(of).sum::<i64>();
    joint.number("records", sum(|books| books.records));
    joint.number("accepted", sum(|books| books.accepted));
    joint.number("duplicates", sum(|books| books.duplicates));
    joint.number("conflicts", sum(|books| books.conflicts));
    joint.number("rejects", sum(|books| books.rejects));
    joint.number("held", sum(|books| books.held));
    joint.differences = books
        .differences
        .iter()
        .filter(|difference| !vendor::is_vendor_kind(&difference.kind))
        .cloned()
        .collect();
    let mut waiting = 0;
    for partition in &books.partitions {
        waiting += end(audit, partition, &mut joint).await?;
    }
    waiting += unread(audit, books).await?;
    joint.number("records_waiting_in_the_log", waiting);
    Ok(joint)
}

/// One step of the continuous audit. Compares again if anything differs: the log may have changed
/// during the first reading.
pub(super) async fn step(
    audit: &Audit,
    known: Vec<Item>,
    _progress: Option<serde_json::Value>,
) -> anyhow::Result<Step> {
    let mut joint = audit.ledger_joints().await?.log?;
    if !joint.differences.is_empty() {
        joint = audit.ledger_joints().await?.log?;
    }
    Ok(step::whole(&joint, &known))
}

/// Compares one position with the log. Returns the number of unread offsets.
async fn end(audit: &Audit, books: &PartitionBooks, joint: &mut Joint) -> anyhow::Result<i64> {
    let (start, end) = audit.log.watermarks(books.partition).await?;
    let id = books.partition.to_string();
    if books.next_offset > end || books.next_offset < start {
        let detail = format!(
            "the ledger's position is {}, the log has offsets {start} to {end}",
            books.next_offset
        );
        joint.differences.push(Difference { kind: "position_outside_the_log".into(), id, detail });
        return Ok(0);
    }
    if let Some(last) = books.last.filter(|last| last.offset >= start) {
        let there = audit.log.read(books.partition, last.offset, 1).await?;
        let same = there.first().is_some_and(|record| {
            record.offset == last.offset && fingerprint(&record.message) == last.fingerprint
        });
        if !same {
            let detail = format!(
                "the record at offset {} is not the one that the ledger has read",
                last.offset
            );
            joint.differences.push(Difference { kind: "another_record".into(), id, detail });
        }
    }
    Ok(end - books.next_offset)
}

/// Records of partitions that no consumer has leased yet.
async fn unread(audit: &Audit, books: &LedgerBooks) -> anyhow::Result<i64> {
    let mut waiting = 0;
    for topic in Topic::ALL {
        for partition in audit.log.partitions(topic).await? {
            let partition = crate::event::TopicPartition { topic, partition };
            if !books.partitions.iter().any(|books| books.partition == partition) {
                let (start, end) = audit.log.watermarks(partition).await?;
                waiting += end - start;
            }
        }
    }
    Ok(waiting)
}
