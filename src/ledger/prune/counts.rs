//! Counts of removed rows, and the acts that take them over.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::Connection as _;
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

use super::evidence;
use super::kinds::PruneKind;
use crate::ledger::leases::hold;
use crate::ledger::{ActKind, Lease, LeaseError, NewAct, acts};

/// Rows that were removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// The number of rows.
    pub rows: i64,
    /// Bytes of their values, before compression, without indexes.
    pub bytes: i64,
}

impl std::ops::AddAssign for Removed {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.bytes += other.bytes;
    }
}

/// The result of one transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemovedPage {
    pub removed: Removed,
    /// Due rows that stay as evidence: their batch does not match its digest.
    pub kept: i64,
}

/// The state of retention for one kind.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct PruneState {
    /// What is removed.
    pub kind: PruneKind,
    /// When the program last looked for due rows; absent: never.
    pub ran_at: Option<DateTime<Utc>>,
    /// Since when the oldest row is due that this round left; absent: it left none.
    pub due_since: Option<DateTime<Utc>>,
    /// Rows removed since the newest act `prune`.
    pub rows: i64,
    /// Bytes of these rows.
    pub bytes: i64,
    /// When the first of these rows was removed; absent: none was.
    pub counted_since: Option<DateTime<Utc>>,
}

/// The state of retention, by kind.
pub async fn states(conn: &mut PgConnection) -> Result<Vec<PruneState>, sqlx::Error> {
    let query =
        "select kind, ran_at, due_since, rows, bytes, counted_since from prune_kind order by kind";
    sqlx::query_as(query).fetch_all(conn).await
}

pub(super) async fn add(
    tx: &mut PgConnection,
    kind: PruneKind,
    removed: Removed,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    if removed.rows == 0 {
        return Ok(());
    }
    sqlx::query(
        "update prune_kind set rows = rows + $2, bytes = bytes + $3, counted_since = coalesce(counted_since, $4) where kind = $1",
    )
    .bind(kind)
    .bind(removed.rows)
    .bind(removed.bytes)
    .bind(now)
    .execute(tx)
    .await?;
    Ok(())
}

/// Records the end of a round of a kind. `due_since`: since when the oldest row is due that the
/// round left.
///
/// # Errors
/// [`LeaseError`]; nothing is written.
pub async fn finish_round(
    conn: &mut PgConnection,
    lease: &Lease,
    kind: PruneKind,
    due_since: Option<DateTime<Utc>>,
    now: DateTime<Utc>,
) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    sqlx::query("update prune_kind set ran_at = $2, due_since = $3 where kind = $1")
        .bind(kind)
        .bind(now)
        .bind(due_since)
        .execute(&mut *tx)
        .await?;
    evidence::forget_old(&mut tx, kind, now).await?;
    Ok(tx.commit().await?)
}

/// Writes an act with the counts since the newest act `prune`, and clears them, in one transaction.
/// Returns the act's id; none: nothing was removed since, and no act is written.
///
/// # Errors
/// [`LeaseError`]; nothing is written.
pub async fn count_in_act(
    conn: &mut PgConnection,
    lease: &Lease,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<Option<i64>, LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    let counted: Vec<(PruneKind, i64, i64)> = sqlx::query_as(
        "update prune_kind set rows = 0, bytes = 0, counted_since = null
         from (select kind, rows, bytes from prune_kind where rows > 0 order by kind for update) as counted
         where prune_kind.kind = counted.kind returning counted.kind, counted.rows, counted.bytes",
    )
    .fetch_all(&mut *tx)
    .await?;
    if counted.is_empty() {
        return Ok(None);
    }
    let removed: Map<String, Value> = counted
        .into_iter()
        .map(|(kind, rows, bytes)| (kind.to_string(), json!({ "rows": rows, "bytes": bytes })))
        .collect();
    let mut detail = act.detail.clone();
    detail["removed"] = Value::Object(removed);
    let act = NewAct { act: ActKind::Prune, detail, ..act.clone() };
    let id = acts::insert(&mut tx, &act, now).await?;
    tx.commit().await?;
    Ok(Some(id))
}
