//! Sources that an operator has retired. The collector and the publisher refuse them, and
//! recoveries and audits do not wait for them.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::findings::finding_columns;
use super::late_audits::forget;
use super::leases::{collector_lease, revoke_leases};
use super::{Finding, NewAct, acts};

/// The retirement of a source.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct Retirement {
    /// The deployment id of the source.
    pub deployment_id: Uuid,
    /// The operator who retired it.
    pub actor: String,
    /// The reason.
    pub reason: String,
    /// When the source was retired.
    pub acted_at: DateTime<Utc>,
}

/// The current retirements, in the order in which the sources were introduced.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<Retirement>, sqlx::Error> {
    sqlx::query_as(
        "select deployment_id, actor, reason, acted_at from source join operator_act act on act.id = retired_act_id order by source.id",
    )
    .fetch_all(conn)
    .await
}

/// The retirement of this source; none: it is in use, or not registered.
pub async fn of_deployment(
    conn: &mut PgConnection,
    deployment_id: Uuid,
) -> Result<Option<Retirement>, sqlx::Error> {
    Ok(list(conn).await?.into_iter().find(|retirement| retirement.deployment_id == deployment_id))
}

/// Retires a registered source. This deletes its audit findings and their progress, releases an open recovery from it,
/// and revokes its collector's lease. False: it is already retired; nothing is changed.
pub async fn retire(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let mut tx = conn.begin().await?;
    revoke_leases(&mut tx, &collector_lease(deployment_id)).await?;
    let findings: Vec<Finding> = sqlx::query_as(concat!(
        "delete from audit_finding where deployment_id = $1 returning ",
        finding_columns!()
    ))
    .bind(deployment_id)
    .fetch_all(&mut *tx)
    .await?;
    forget(&mut tx, deployment_id).await?;
    let act = NewAct { detail: serde_json::json!({ "findings": findings }), ..act.clone() };
    let act_id = acts::insert(&mut tx, &act, now).await?;
    let retired = set_retired(&mut tx, deployment_id, Some(act_id)).await?;
    if !retired {
        return Ok(false);
    }
    sqlx::query(
        "update recovery_source set given_up_act_id = $2 from source, recovery
         where source.id = source_id and deployment_id = $1 and recovery.id = recovery_id and closed_at is null and given_up_act_id is null",
    )
    .bind(deployment_id)
    .bind(act_id)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(true)
}

/// Ends a source's retirement. False: it is not retired; nothing is changed.
pub async fn reinstate(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let mut tx = conn.begin().await?;
    if !set_retired(&mut tx, deployment_id, None).await? {
        return Ok(false);
    }
    acts::insert(&mut tx, act, now).await?;
    tx.commit().await?;
    Ok(true)
}

/// Returns false if the source already has the requested state.
async fn set_retired(
    tx: &mut PgConnection,
    deployment_id: Uuid,
    act_id: Option<i64>,
) -> Result<bool, sqlx::Error> {
    let changed = sqlx::query(
        "update source set retired_act_id = $2 where deployment_id = $1 and (retired_act_id is null) = ($2::bigint is not null)",
    )
    .bind(deployment_id)
    .bind(act_id)
    .execute(tx)
    .await?;
    Ok(changed.rows_affected() == 1)
}
