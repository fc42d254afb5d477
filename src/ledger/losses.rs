//! Events that coderd lost when its database was restored to an earlier time. The ledger keeps
//! them.

use std::collections::{BTreeMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;
use uuid::Uuid;

use super::leases::{ALL_COLLECTORS, revoke_leases};
use super::publications::lock;
use super::{NewAct, PublicationState, acts, plans};
use crate::event::{Topic, UsageType};

/// An accepted usage event and its publication state.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct UsageOutcome {
    pub id: String,
    pub event_type: UsageType,
    /// An unsigned 64-bit number in the type's unit.
    pub quantity: String,
    pub state: PublicationState,
    pub created_at: DateTime<Utc>,
}

/// These usage events of the source as corrected, with their publication states, by id. Events that
/// the ledger lacks are left out.
pub async fn usage_outcomes(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<BTreeMap<String, UsageOutcome>, sqlx::Error> {
    let outcomes: Vec<UsageOutcome> = sqlx::query_as(
        "select usage.id, usage.event_type, usage.quantity::text as quantity, publication.state, usage.created_at
         from usage_as_of(9223372036854775807) usage join publication on publication.source_id = usage.source_id and event_id = usage.id
         where usage.source_id = $1 and usage.id = any($2)",
    )
    .bind(source_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(outcomes.into_iter().map(|outcome| (outcome.id.clone(), outcome)).collect())
}

/// The number of accepted builds, prebuild claims and usage events of the source.
pub async fn source_events(conn: &mut PgConnection, source_id: i16) -> Result<i64, sqlx::Error> {
    let query =
        "select (select count(*) from workspace_build where source_id = $1) + (select count(*) from prebuild_claim where source_id = $1)
             + (select count(*) from usage_event where source_id = $1)";
    sqlx::query_scalar(query).bind(source_id).fetch_one(conn).await
}

/// The event ids among these that coderd is known to have lost.
pub async fn lost_ids(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<HashSet<String>, sqlx::Error> {
    let rows: Vec<String> = sqlx::query_scalar(
        "select event_id from source_lost where source_id = $1 and event_id = any($2)",
    )
    .bind(source_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().collect())
}

/// The number of the deployment's usage records that were refused because their id has other
/// accepted content.
pub async fn usage_conflicts(
    conn: &mut PgConnection,
    deployment_id: Uuid,
) -> Result<i64, sqlx::Error> {
    let query = "select count(*) from reject where deployment_id = $1 and disposition = 'conflict' and topic = $2";
    sqlx::query_scalar(query)
        .bind(deployment_id)
        .bind(Topic::AgentUsage.name())
        .fetch_one(conn)
        .await
}

/// Records events as lost in coderd, executing the plan of that hash. Each collector must open
/// again and rereads everything. False: the plan was executed before.
pub async fn record(
    conn: &mut PgConnection,
    source_id: i16,
    event_ids: &[String],
    act: &NewAct<'_>,
    plan: &str,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let mut tx = conn.begin().await?;
    revoke_leases(&mut tx, ALL_COLLECTORS).await?;
    let act_id = acts::insert(&mut tx, act, now).await?;
    sqlx::query(
        "insert into source_lost (source_id, event_id, batch_id, act_id)
         select $1, event_id, act.batch_id, act.id from unnest($2::text[]) as lost (event_id) join operator_act act on act.id = $3
         order by event_id on conflict do nothing",
    )
    .bind(source_id)
    .bind(event_ids)
    .bind(act_id)
    .execute(&mut *tx)
    .await?;
    if !plans::mark_executed(&mut tx, plan, act_id, now).await? {
        return Ok(false);
    }
    // Publications held because their row is gone or differs are due at once: the act authorises
    // them.
    lock(&mut tx, source_id, event_ids).await?;
    sqlx::query("update publication set next_attempt_at = $3 where source_id = $1 and event_id = any($2) and state = 'pending' and leased_by is null")
        .bind(source_id)
        .bind(event_ids)
        .bind(now)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(true)
}
