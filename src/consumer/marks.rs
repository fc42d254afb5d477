//! The marks of the consumers' group: how far the log was recorded, as Kafka remembers it outside the ledger.

use chrono::{DateTime, Utc};

use crate::ledger::{Ledger, Restored};
use crate::log::{Log, Mark};

/// The mark of this incarnation that is ahead of the ledger's position and reaches furthest in time.
/// It proves that the ledger went back: the group is told of a batch only after its commit. A log in
/// PostgreSQL has no marks.
pub async fn mark_ahead(log: &Log, ledger: &Ledger, group: &str) -> anyhow::Result<Option<Restored>> {
    // In this order positions are at the marks or further, and a life that ends meanwhile changes the
    // signature.
    let marks = log.marks(group).await?;
    let positions = ledger.in_time(ledger.positions()).await?;
    let lives = ledger.in_time(ledger.lives()).await?;
    let signature = lives.mark();
    // a backup may be older than the partition's first position
    let is_ahead =
        |mark: &Mark| !positions.iter().any(|(partition, next_offset)| *partition == mark.partition && *next_offset >= mark.next_offset);
    let mut furthest = None;
    for mark in marks.into_iter().filter(|mark| mark.signature == signature && is_ahead(mark)) {
        let read_until = read_until(log, &mark).await;
        if furthest.as_ref().is_none_or(|(until, _)| *until < read_until) {
            furthest = Some((read_until, mark));
        }
    }
    Ok(furthest.map(|(read_until, Mark { partition, next_offset, .. })| Restored::Position {
        incarnation: lives.incarnation,
        partition,
        next_offset,
        read_until,
    }))
}

/// When the last record before the mark came to the log; none where the log no longer has it.
async fn read_until(log: &Log, mark: &Mark) -> Option<DateTime<Utc>> {
    let last = mark.next_offset - 1;
    let records = log.read(mark.partition, last, 1).await.ok()?;
    records.first().filter(|record| record.offset == last).map(|record| record.timestamp)
}
