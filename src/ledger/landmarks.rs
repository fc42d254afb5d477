//! Whether this still is the ledger that was there before: one restored from a backup has lost its newest batches.

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use uuid::Uuid;

use super::{Ledger, Sequence};

/// A batch by which the ledger is known again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct Landmark {
    /// The ledger's identity when the batch was seen.
    pub incarnation: Uuid,
    pub sequence: i64,
    pub batch_id: i64,
    /// When it was recorded: a ledger that went back and grew again may give sequence and id a second time.
    pub recorded_at: DateTime<Utc>,
}

/// What the ledger is to somebody who has seen it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquaintance {
    /// The same, or never seen before.
    Same,
    /// A later incarnation: the loss is known already.
    Another,
    /// It does not know the incarnation, or lacks a batch of it: it was restored from a backup, and no recovery is open for that yet.
    WentBack,
}

impl Ledger {
    /// Identity and highest sequence of one moment, and whether the ledger is the one that had this batch.
    pub async fn head_seen_from(&self, landmark: Option<&Landmark>) -> Result<(Sequence, Acquaintance), sqlx::Error> {
        let Some(landmark) = landmark else { return Ok((self.head().await?, Acquaintance::Same)) };
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
        .fetch_one(&self.pool)
        .await?;
        let head = Sequence { incarnation, number: sequence };
        let acquaintance = match (incarnation == landmark.incarnation, has_batch, is_past) {
            (true, true, _) => Acquaintance::Same,
            (false, _, true) => Acquaintance::Another,
            (true, false, _) | (false, _, false) => Acquaintance::WentBack,
        };
        Ok((head, acquaintance))
    }

    /// The batch of that sequence, to know the ledger again; none for 0, the empty ledger, nor for one that is not there.
    pub async fn landmark(&self, sequence: i64) -> Result<Option<Landmark>, sqlx::Error> {
        sqlx::query_as("select incarnation, sequence, id as batch_id, recorded_at from ledger, batch where sequence = $1")
            .bind(sequence)
            .fetch_optional(&self.pool)
            .await
    }
}
