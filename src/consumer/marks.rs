//! The consumer group's marks: how far the log was recorded, as Kafka stores it outside the ledger.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::ledger::{Ledger, PartitionGenerations, RestoreEvidence, restored};
use crate::log::{Log, Mark};

/// Returns the mark that is unknown to this ledger and reaches furthest in time. It proves a
/// restore, because a mark follows its batch's commit. A log in PostgreSQL has no marks. The
/// function queries the ledger once per partition.
pub async fn mark_ahead(
    log: &Log,
    ledger: &Ledger,
    group: &str,
) -> anyhow::Result<Option<RestoreEvidence>> {
    // The marks are read before the ledger, so that the ledger's position is equal or higher.
    let marks = log.marks(group).await?;
    let marks: Vec<(PartitionGenerations, Mark)> = marks
        .into_iter()
        .filter_map(|mark| Some((PartitionGenerations::of_signature(&mark.signature)?, mark)))
        .collect();
    let marked: Vec<Uuid> = marks.iter().map(|(generations, _)| generations.incarnation).collect();
    let mut furthest = None;
    for (generations, mark) in marks {
        let Mark { partition, next_offset, .. } = mark;
        let restored = |read_until| RestoreEvidence::Position {
            generations,
            partition,
            next_offset,
            read_until,
            marked: marked.clone(),
        };
        if ledger.run(async |conn| restored::is_restored(conn, &restored(None)).await).await? {
            let read_until = read_until(log, &mark).await;
            if furthest.as_ref().is_none_or(|(until, _)| *until < read_until) {
                furthest = Some((read_until, restored(read_until)));
            }
        }
    }
    Ok(furthest.map(|(_, restored)| restored))
}

/// When the last record before the mark was appended; none if the log no longer has it.
async fn read_until(log: &Log, mark: &Mark) -> Option<DateTime<Utc>> {
    let last = mark.next_offset - 1;
    let records = log.read(mark.partition, last, 1).await.ok()?;
    records.first().filter(|record| record.offset == last).map(|record| record.timestamp)
}
