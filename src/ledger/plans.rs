//! Plans by the hash of their effect.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{FromRow, PgConnection};

#[derive(Clone, Debug, FromRow)]
pub struct KeptPlan {
    /// The operator's request.
    pub request: Value,
    /// The effect in the plan's answer.
    pub effect: Value,
    /// When the plan was last made.
    pub planned_at: DateTime<Utc>,
    /// The act that executed the plan; none: not yet.
    pub act_id: Option<i64>,
}

/// Keeps a plan under its hash. A plan with the same effect is the same plan; if it was executed,
/// it can be executed again.
pub async fn save(
    conn: &mut PgConnection,
    hash: &str,
    kind: &'static str,
    request: &Value,
    effect: &Value,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into plan (hash, kind, request, effect, planned_at) values ($1, $2, $3, $4, $5)
         on conflict (hash) do update set planned_at = excluded.planned_at, effect = excluded.effect, act_id = null,
             finished_at = null",
    )
    .bind(hash)
    .bind(kind)
    .bind(request)
    .bind(effect)
    .bind(now)
    .execute(conn)
    .await?;
    Ok(())
}

/// The plan of that kind and hash, if any.
pub async fn load(
    conn: &mut PgConnection,
    hash: &str,
    kind: &'static str,
) -> Result<Option<KeptPlan>, sqlx::Error> {
    sqlx::query_as(
        "select request, effect, planned_at, act_id from plan where hash = $1 and kind = $2",
    )
    .bind(hash)
    .bind(kind)
    .fetch_optional(conn)
    .await
}

/// Marks a plan as executed by this act, in the act's transaction. False: it was executed before.
pub(super) async fn mark_executed(
    tx: &mut PgConnection,
    hash: &str,
    act_id: i64,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let marked = sqlx::query(
        "update plan set act_id = $2, finished_at = $3 where hash = $1 and act_id is null",
    )
    .bind(hash)
    .bind(act_id)
    .bind(now)
    .execute(tx)
    .await?;
    Ok(marked.rows_affected() == 1)
}
