//! Saved states of folds, so that a process need not start from zero.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::FromRow;
use sqlx::PgConnection;

use super::{ActKind, NewAct, Sequence, Subject, acts};

/// Number of snapshots kept per stage and rules version. Saving a newer one deletes older ones.
const KEPT: i64 = 2;

/// The state of a stage after a batch.
#[derive(Clone, Debug, FromRow)]
pub struct Snapshot {
    /// The last batch in the state.
    pub sequence: Sequence,
    /// The state in the stage's own format.
    pub state: Vec<u8>,
}

/// The ledger's incarnation and highest sequence, in one snapshot.
pub async fn head(conn: &mut PgConnection) -> Result<Sequence, sqlx::Error> {
    sqlx::query_scalar("select named_sequence(next_sequence - 1) from ledger").fetch_one(conn).await
}

/// The ledger's head, and whether a recovery is open, in one snapshot.
pub async fn head_and_recovery(conn: &mut PgConnection) -> Result<(Sequence, bool), sqlx::Error> {
    let query = "select named_sequence(next_sequence - 1), exists (select from recovery where closed_at is null) from ledger";
    sqlx::query_as(query).fetch_one(conn).await
}

/// The stage's newest snapshot under these rules in this incarnation, at sequence `limit` or lower.
pub async fn load(
    conn: &mut PgConnection,
    stage: &str,
    rules_version: i32,
    limit: i64,
) -> Result<Option<Snapshot>, sqlx::Error> {
    sqlx::query_as(
        "select named_sequence(snapshot.sequence) as sequence, state from snapshot join ledger using (incarnation)
         where stage = $1 and rules_version = $2 and sequence <= $3 and sequence < next_sequence
         order by snapshot.sequence desc limit 1",
    )
    .bind(stage)
    .bind(rules_version)
    .bind(limit)
    .fetch_optional(conn)
    .await
}

/// Saves a snapshot and deletes all but the newest. A snapshot of another incarnation is not saved:
/// here its sequence is another batch.
pub async fn save(
    conn: &mut PgConnection,
    stage: &str,
    rules_version: i32,
    snapshot: &Snapshot,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into snapshot (stage, rules_version, incarnation, sequence, state, taken_at)
         select $1, $2, incarnation, $3, $4, $5 from ledger where incarnation = $6 on conflict do nothing",
    )
    .bind(stage)
    .bind(rules_version)
    .bind(snapshot.sequence.number)
    .bind(&snapshot.state)
    .bind(now)
    .bind(snapshot.sequence.incarnation)
    .execute(&mut *conn)
    .await?;
    sqlx::query(
        "delete from snapshot where stage = $1 and rules_version = $2 and (incarnation <> (select incarnation from ledger) or sequence not in
             (select sequence from snapshot join ledger using (incarnation) where stage = $1 and rules_version = $2
              order by sequence desc limit $3))",
    )
    .bind(stage)
    .bind(rules_version)
    .bind(KEPT)
    .execute(&mut *conn)
    .await?;
    Ok(())
}

/// Deletes every snapshot of the stage and writes the act that requests it. The act's subject is
/// the stage. Every fold that reaches the act's batch restarts from zero there, even one that began
/// at a snapshot saved meanwhile.
pub async fn rebuild(
    conn: &mut PgConnection,
    stage: &str,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    sqlx::query("delete from snapshot where stage = $1").bind(stage).execute(&mut *tx).await?;
    acts::insert(
        &mut tx,
        &NewAct { act: ActKind::Rebuild, subject: Subject::Named(stage), ..act.clone() },
        now,
    )
    .await?;
    tx.commit().await
}
