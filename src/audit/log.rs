//! Compares log and ledger. A partition's batches form a chain. Each record is accepted, duplicate,
//! conflict, rejected or held. The log is still the one that was read.

use super::joint::{Audit, Joint, LOG};
use super::step::{Item, Step};
use super::turn::Pace;
use super::turns::{self, LedgerProgress};
use super::vendor;
use crate::event::{Topic, TopicPartition};
use crate::ledger::checks::{self, CheckRequest, PositionBooks};
use crate::ledger::{Difference, LastRecord, LedgerBooks, PartitionBooks, fingerprint};

/// Kinds of differences that a step judges only after it has read the newest batch.
const POSITION_KINDS: [&str; 3] =
    ["position_off_its_chain", "position_outside_the_log", "another_record"];

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
        let PartitionBooks { partition, next_offset, last, .. } = *partition;
        waiting += end(audit, partition, next_offset, last, &mut joint.differences).await?;
    }
    waiting += unread(audit, books).await?;
    joint.number("records_waiting_in_the_log", waiting);
    Ok(joint)
}

/// One step of the continuous audit.
pub(super) async fn step(
    audit: &Audit,
    known: Vec<Item>,
    progress: Option<serde_json::Value>,
    pace: &Pace,
) -> anyhow::Result<Step> {
    let mut progress = LedgerProgress::of(progress);
    let request = CheckRequest { audited: progress.audited, keys: None, known: &known };
    let checked = audit.ledger.run(async |conn| checks::log_joint(conn, &request).await).await?;
    let behind = !checked.new.is_last;
    let mut found = progress.advance(&checked.new);
    found.extend(checked.known);
    if !behind {
        found.extend(progress.take_turns(audit, LOG, pace).await?);
        found.extend(off_their_chains(audit, &mut progress, &checked.positions).await?);
        found.extend(ends(audit, checked.positions).await?);
    }
    let of_positions = |item: &Item| behind && POSITION_KINDS.contains(&&*item.kind);
    let step = turns::step(audit, LOG, known, found, &progress, of_positions).await?;
    Ok(Step { behind, ..step })
}

/// Positions that are not at the end of their chain. Only such a chain is counted again from its
/// first batch: its sum may be of a batch that was changed meanwhile.
async fn off_their_chains(
    audit: &Audit,
    progress: &mut LedgerProgress,
    positions: &[PositionBooks],
) -> anyhow::Result<Vec<Difference>> {
    let mut found = Vec::new();
    for position in positions {
        let sums = progress.chains.get(&position.chain()).copied().unwrap_or_default();
        if position.difference(sums.records).is_none() {
            continue;
        }
        let (partition, audited) = (position.partition, progress.audited.sequence);
        let again =
            audit.ledger.run(async |conn| checks::recount(conn, partition, audited).await).await?;
        let Some((position, until_audited, all)) = again else { continue };
        progress.chains.insert(position.chain(), until_audited);
        found.extend(position.difference(all.records));
    }
    Ok(found)
}

/// Compares the positions with the log. Compares again if anything differs: the log may have
/// changed during the first reading.
async fn ends(audit: &Audit, positions: Vec<PositionBooks>) -> anyhow::Result<Vec<Difference>> {
    let first = ends_once(audit, &positions).await?;
    if first.is_empty() {
        return Ok(first);
    }
    let positions = audit.ledger.run(checks::positions).await?;
    ends_once(audit, &positions).await
}

async fn ends_once(audit: &Audit, positions: &[PositionBooks]) -> anyhow::Result<Vec<Difference>> {
    let mut found = Vec::new();
    for position in positions {
        end(audit, position.partition, position.next_offset, position.last, &mut found).await?;
    }
    Ok(found)
}

/// Compares one position with the log. Returns the number of unread offsets.
async fn end(
    audit: &Audit,
    partition: TopicPartition,
    next_offset: i64,
    last: Option<LastRecord>,
    found: &mut Vec<Difference>,
) -> anyhow::Result<i64> {
    let (start, end) = audit.log.watermarks(partition).await?;
    let id = partition.to_string();
    if next_offset > end || next_offset < start {
        let detail =
            format!("the ledger's position is {next_offset}, the log has offsets {start} to {end}");
        found.push(Difference { kind: "position_outside_the_log".into(), id, detail });
        return Ok(0);
    }
    if let Some(last) = last.filter(|last| last.offset >= start) {
        let there = audit.log.read(partition, last.offset, 1).await?;
        let same = there.first().is_some_and(|record| {
            record.offset == last.offset && fingerprint(&record.message) == last.fingerprint
        });
        if !same {
            let detail = format!(
                "the record at offset {} is not the one that the ledger has read",
                last.offset
            );
            found.push(Difference { kind: "another_record".into(), id, detail });
        }
    }
    Ok(end - next_offset)
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
