//! The marks of the consumers' group in Kafka: how far the ledger had read the log, as somebody outside of it knows.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::super::{Desk, OperationError};
use crate::log::Mark;

/// Marks of this incarnation of the ledger that are ahead of it, with its identity: it was restored from a backup. The group is told after the
/// ledger has committed.
pub(super) async fn ahead(desk: &Desk) -> Result<Vec<(Uuid, Mark)>, OperationError> {
    let ledger = &desk.ledger;
    let marks = desk.log.marks(&desk.group).await?;
    let lives = ledger.in_time(ledger.lives()).await?;
    let signature = lives.mark();
    let standings = ledger.in_time(ledger.standings()).await?;
    let behind = |mark: &Mark| standings.iter().any(|stands| stands.partition == mark.partition && stands.next_offset < mark.next_offset);
    let ahead = marks.into_iter().filter(|mark| mark.signature == signature && behind(mark));
    Ok(ahead.map(|mark| (lives.incarnation, mark)).collect())
}

/// When the last record before the mark came to the log; none where the log has it no more.
pub(super) async fn read_until(desk: &Desk, mark: &Mark) -> Option<DateTime<Utc>> {
    let last = mark.next_offset - 1;
    let records = desk.log.read(mark.partition, last, 1).await.ok()?;
    records.first().filter(|record| record.offset == last).map(|record| record.timestamp)
}
