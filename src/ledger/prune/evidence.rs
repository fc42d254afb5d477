//! Batches that do not match their recorded digests. Their rows past retention are evidence of a
//! change by hand, and stay.

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;

use super::kinds::PruneKind;

/// Days after which such a batch is compared again: an operator may have restored its rows.
const AGAIN_DAYS: i64 = 30;

/// The part of a batch's content that contains the kind's rows.
fn part(kind: PruneKind) -> Option<&'static str> {
    match kind {
        PruneKind::RejectPayloads => Some("rejects"),
        PruneKind::Attempts => Some("attempts"),
        PruneKind::Plans | PruneKind::Snapshots => None,
    }
}

/// The batches of these whose rows of the kind match the digest recorded with the batch. Notes the
/// others, so that later pages need not compare them. Reads all rows of the kind in these batches,
/// by index.
pub(super) async fn matching(
    tx: &mut PgConnection,
    kind: PruneKind,
    batches: &[i64],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let matching: Vec<i64> = sqlx::query_scalar(
        r#"select stored.batch_id from batch_part stored
           where stored.batch_id = any($1) and stored.part = $2 and stored.sha256 = (
               select sha256(string_agg(digest, '' order by name collate "C", digest)) from chained_row
               where batch_id = stored.batch_id and part = $2)"#,
    )
    .bind(batches)
    .bind(part(kind))
    .fetch_all(&mut *tx)
    .await?;
    let differing: Vec<i64> =
        batches.iter().copied().filter(|batch| !matching.contains(batch)).collect();
    if !differing.is_empty() {
        sqlx::query(
            "insert into prune_evidence (batch_id, part, found_at) select distinct batch_id, $2, $3 from unnest($1::bigint[]) as found (batch_id)
             on conflict do nothing",
        )
        .bind(differing)
        .bind(part(kind))
        .bind(now)
        .execute(tx)
        .await?;
    }
    Ok(matching)
}

/// Forgets the batches of the kind that were found long ago: the next round compares them again.
pub(super) async fn forget_old(
    tx: &mut PgConnection,
    kind: PruneKind,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    sqlx::query("delete from prune_evidence where part = $1 and found_at < $2")
        .bind(part(kind))
        .bind(now - TimeDelta::days(AGAIN_DAYS))
        .execute(tx)
        .await
        .map(drop)
}
