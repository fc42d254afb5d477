//! A fold's state after a batch, so that a process need not begin at zero.

use sqlx::FromRow;

use super::{ActKind, Ledger, NewAct, Sequence, Subject};

/// Kept for each stage and rules version; older ones go when a newer one is saved.
const KEPT: i64 = 2;

/// The state of a stage after a batch.
#[derive(Clone, Debug, FromRow)]
pub struct Snapshot {
    /// The last batch in it.
    pub sequence: Sequence,
    /// The stage's own serialisation.
    pub state: Vec<u8>,
}

impl Ledger {
    /// Identity and highest sequence, of one moment.
    pub async fn head(&self) -> Result<Sequence, sqlx::Error> {
        sqlx::query_scalar("select named_sequence(next_sequence - 1) from ledger").fetch_one(&self.pool).await
    }

    /// Identity and highest sequence, and whether it is a restored ledger that has not caught up yet, of one moment.
    pub async fn head_and_recovery(&self) -> Result<(Sequence, bool), sqlx::Error> {
        let query = "select named_sequence(next_sequence - 1), exists (select from recovery where closed_at is null) from ledger";
        sqlx::query_as(query).fetch_one(&self.pool).await
    }

    /// The newest snapshot of this stage under these rules in this incarnation, at most at `limit`.
    pub async fn load_snapshot(&self, stage: &str, rules_version: i32, limit: i64) -> Result<Option<Snapshot>, sqlx::Error> {
        sqlx::query_as(
            "select named_sequence(snapshot.sequence) as sequence, state from snapshot join ledger using (incarnation)
             where stage = $1 and rules_version = $2 and sequence <= $3 and sequence < next_sequence
             order by snapshot.sequence desc limit 1",
        )
        .bind(stage)
        .bind(rules_version)
        .bind(limit)
        .fetch_optional(&self.pool)
        .await
    }

    /// Keeps a snapshot and lets all but the newest few go. One of another incarnation is not kept: its sequence means another batch here.
    pub async fn save_snapshot(&self, stage: &str, rules_version: i32, snapshot: &Snapshot) -> Result<(), sqlx::Error> {
        sqlx::query(
            "insert into snapshot (stage, rules_version, incarnation, sequence, state, taken_at)
             select $1, $2, incarnation, $3, $4, $5 from ledger where incarnation = $6 on conflict do nothing",
        )
        .bind(stage)
        .bind(rules_version)
        .bind(snapshot.sequence.number)
        .bind(&snapshot.state)
        .bind(self.clock.now())
        .bind(snapshot.sequence.incarnation)
        .execute(&self.pool)
        .await?;
        sqlx::query(
            "delete from snapshot where stage = $1 and rules_version = $2 and (incarnation <> (select incarnation from ledger) or sequence not in
                 (select sequence from snapshot join ledger using (incarnation) where stage = $1 and rules_version = $2
                  order by sequence desc limit $3))",
        )
        .bind(stage)
        .bind(rules_version)
        .bind(KEPT)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Lets every snapshot of the stage go, with the act that asks for it. Its subject is the stage: every fold that comes to the act's batch
    /// begins again from zero there, also one that went on from a snapshot which was saved meanwhile.
    pub async fn rebuild(&self, stage: &str, act: &NewAct<'_>) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        sqlx::query("delete from snapshot where stage = $1").bind(stage).execute(&mut *tx).await?;
        self.act(&mut tx, &NewAct { act: ActKind::Rebuild, subject: Subject::Named(stage), ..act.clone() }).await?;
        tx.commit().await
    }
}
