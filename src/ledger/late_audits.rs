//! Joints whose audit is late, which holds publishing: without audits a difference would not hold
//! anything.

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, FromRow, PgConnection};
use uuid::Uuid;

use super::{NewAct, acts};

/// The names of the joints.
pub const SOURCE_JOINT: &str = "source and ledger";
pub const LOG_JOINT: &str = "log and ledger";
pub const VENDOR_JOINT: &str = "ledger and vendor";

/// A joint without an audit in the set time that reached the newest batch.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct LateAudit {
    /// The name of the joint.
    pub joint: String,
    /// The deployment of a joint that covers only one; absent for the whole ledger.
    pub deployment_id: Option<Uuid>,
    /// When the joint was last audited, by the database's clock; absent: never.
    pub audited_at: Option<DateTime<Utc>>,
    /// Since when the audit is late; absent: no audit has reached the newest batch.
    pub since: Option<DateTime<Utc>>,
    /// The operator who publishes without the audit; absent: publishing is held.
    #[sqlx(json(nullable))]
    pub overridden: Option<AuditOverride>,
}

/// An operator's act that publishes without a joint's audit, until its next one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct AuditOverride {
    /// The operator.
    pub actor: String,
    /// The reason, in the operator's words.
    pub reason: String,
    /// When the operator did it.
    pub acted_at: DateTime<Utc>,
}

/// The late joints, by name and deployment, without retired sources. It reads a few rows of each
/// source.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<LateAudit>, sqlx::Error> {
    sqlx::query_as(
        "select due.joint, due.deployment_id, last.audited_at, last.good_until as since,
             case when act.id is not null then jsonb_build_object('actor', act.actor, 'reason', act.reason, 'acted_at', act.acted_at) end as overridden
         from (select $1 as joint, null::uuid as deployment_id union all select $2, null
               union all select $3, deployment_id from source where retired_act_id is null) as due
         left join audit_finding last on last.joint = due.joint and last.deployment_id is not distinct from due.deployment_id
         left join audit_override on audit_override.joint = due.joint and audit_override.deployment_id is not distinct from due.deployment_id
         left join operator_act act on act.id = act_id
         where last.good_until is null or last.good_until <= clock_timestamp()
         order by due.joint, due.deployment_id",
    )
    .bind(LOG_JOINT)
    .bind(VENDOR_JOINT)
    .bind(SOURCE_JOINT)
    .fetch_all(conn)
    .await
}

/// Publishes without the late audits of this deployment; None: without those of the whole ledger.
/// Returns the joints; none of them is late: nothing is written.
pub async fn publish_without(
    conn: &mut PgConnection,
    deployment: Option<Uuid>,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<Vec<LateAudit>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let mut late = list(&mut tx).await?;
    late.retain(|late| late.deployment_id == deployment);
    if late.is_empty() {
        return Ok(late);
    }
    let act = NewAct { detail: serde_json::json!({ "unaudited": late }), ..act.clone() };
    let act_id = acts::insert(&mut tx, &act, now).await?;
    for joint in &late {
        sqlx::query(
            "insert into audit_override (joint, deployment_id, act_id) values ($1, $2, $3)
             on conflict (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000')) do update set act_id = excluded.act_id",
        )
        .bind(&joint.joint)
        .bind(deployment)
        .bind(act_id)
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    Ok(late)
}

/// Ends the override of a joint whose audit has reached the newest batch.
pub(super) async fn end_override(
    tx: &mut PgConnection,
    joint: &str,
    deployment: Option<Uuid>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "delete from audit_override where joint = $1 and deployment_id is not distinct from $2",
    )
    .bind(joint)
    .bind(deployment)
    .execute(tx)
    .await?;
    Ok(())
}

/// Deletes what the audits know of a retired source.
pub(super) async fn forget(tx: &mut PgConnection, deployment: Uuid) -> Result<(), sqlx::Error> {
    for statement in [
        "delete from audit_item where deployment_id = $1",
        "delete from audit_progress where deployment_id = $1",
        "delete from audit_override where deployment_id = $1",
    ] {
        sqlx::query(statement).bind(deployment).execute(&mut *tx).await?;
    }
    Ok(())
}
