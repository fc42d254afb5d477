//! Plans that were executed, or never, with the ranges of replays.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::counts::Removed;
use super::kinds::{Due, DueKey, DuePage, ROWS_AT_ONCE};

/// Reads all plans: an operator makes each of them. A plan in execution stays.
pub(super) async fn due(
    conn: &mut PgConnection,
    before: DateTime<Utc>,
) -> Result<DuePage, sqlx::Error> {
    let rows: Vec<(String, i64, DateTime<Utc>)> = sqlx::query_as(
        "select hash, pg_column_size(plan.*)::bigint, coalesce(finished_at, planned_at) from plan
         where finished_at < $1 or act_id is null and planned_at < $1 order by 3, 1 limit $2",
    )
    .bind(before)
    .bind(ROWS_AT_ONCE)
    .fetch_all(conn)
    .await?;
    let due = rows.into_iter().map(|(hash, bytes, ended_at)| Due {
        key: DueKey::Plan(hash),
        place: None,
        rows: 1,
        bytes,
        ended_at,
    });
    Ok(DuePage { due: due.collect(), ..DuePage::default() })
}

pub(super) async fn remove(
    tx: &mut PgConnection,
    before: DateTime<Utc>,
    due: &[Due],
) -> Result<Removed, sqlx::Error> {
    let hashes: Vec<&str> = due
        .iter()
        .filter_map(|one| match &one.key {
            DueKey::Plan(hash) => Some(hash.as_str()),
            _ => None,
        })
        .collect();
    let hashes: Vec<String> = sqlx::query_scalar(
        "select hash from plan where hash = any($1) and (finished_at < $2 or act_id is null and planned_at < $2) for update",
    )
    .bind(hashes)
    .bind(before)
    .fetch_all(&mut *tx)
    .await?;
    sqlx::query("delete from replay where plan_hash = any($1)")
        .bind(&hashes)
        .execute(&mut *tx)
        .await?;
    let (rows, bytes): (i64, i64) = sqlx::query_as(
        "with removed as (delete from plan where hash = any($1) returning pg_column_size(plan.*)::bigint as bytes)
         select count(*), coalesce(sum(bytes), 0)::bigint from removed",
    )
    .bind(hashes)
    .fetch_one(tx)
    .await?;
    Ok(Removed { rows, bytes })
}
