//! Detects a ledger that was restored from a backup: it lacks its newest batches.

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Sequence, snapshots};

/// A batch that identifies the ledger later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct Landmark {
    /// The ledger's incarnation when the batch was read.
    pub incarnation: Uuid,
    pub sequence: i64,
    pub batch_id: i64,
    /// When the batch was recorded: a restored ledger may assign the same sequence and id to
    /// another batch.
    pub recorded_at: DateTime<Utc>,
}

/// The relation of the ledger to an earlier landmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerIdentity {
    /// The same ledger, or one without a landmark yet.
    Same,
    /// A later incarnation: the loss is already known.
    Another,
    /// The ledger lacks the incarnation or the batch: it was restored from a backup, and a recovery
    /// is not open yet.
    Restored,
}

/// The ledger's head, and whether the ledger is the one that had this batch, in one snapshot.
pub async fn head_and_identity(
    conn: &mut PgConnection,
    landmark: Option<&Landmark>,
) -> Result<(Sequence, LedgerIdentity), sqlx::Error> {
    let Some(landmark) = landmark else {
        return Ok((snapshots::head(conn).await?, LedgerIdentity::Same));
    };
    let (incarnation, sequence, has_batch, is_past) = sqlx::query_as(
        "select incarnation, next_sequence - 1, next_sequence > $1
             and exists (select from batch where sequence = $1 and id = $2 and recorded_at = $3),
             exists (select from past_incarnation past where past.incarnation = $4)
         from ledger",
    )
    .bind(landmark.sequence)
    .bind(landmark.batch_id)
    .bind(landmark.recorded_at)
    .bind(landmark.incarnation)
    .fetch_one(conn)
    .await?;
    let head = Sequence { incarnation, number: sequence };
    let identity = match (incarnation == landmark.incarnation, has_batch, is_past) {
        (true, true, _) => LedgerIdentity::Same,
        (false, _, true) => LedgerIdentity::Another,
        (true, false, _) | (false, _, false) => LedgerIdentity::Restored,
    };
    Ok((head, identity))
}

/// The batch of that sequence, to identify the ledger later. None for 0, the empty ledger, and for
/// a missing batch.
pub async fn of_batch(
    conn: &mut PgConnection,
    sequence: i64,
) -> Result<Option<Landmark>, sqlx::Error> {
    sqlx::query_as("select incarnation, sequence, id as batch_id, recorded_at from ledger, batch where sequence = $1")
        .bind(sequence)
        .fetch_optional(conn)
        .await
}
