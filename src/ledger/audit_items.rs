//! The continuous audit's progress at each joint, and its findings that have not ended.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::types::Json;
use sqlx::{Connection as _, FromRow, PgConnection};
use uuid::Uuid;

use super::late_audits::end_override;
use super::leases::hold;
use super::{Difference, Lease, LeaseError, Sequence};

/// Number of differences per joint that are kept with the finding.
const EXAMPLES: i64 = 10;

/// One finding of the continuous audit that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, FromRow)]
pub struct AuditItem {
    /// The kind, the id and the detail of a [`Difference`].
    pub kind: String,
    pub id: String,
    pub detail: String,
    /// Work for an operator, not a difference.
    pub is_open: bool,
    /// Usage of the last 30 days that coderd was seen to have.
    pub is_recent_usage: bool,
}

/// One step of the continuous audit at one joint.
#[derive(Clone, Debug, Default)]
pub struct AuditStep {
    /// Ids that this step judged. Known items of these ids that are not in `items` have ended.
    pub judged: BTreeSet<String>,
    /// What differs of these ids now.
    pub items: Vec<AuditItem>,
    /// The joint's progress after the step.
    pub progress: serde_json::Value,
    /// Confirmed builds and claims that coderd no longer has, in all.
    pub gone: i64,
    /// Whether the joint has more new rows than the step has read.
    pub behind: bool,
    /// Whether rows that may be in flight could not be judged. Such a step does not count as an
    /// audit: it neither allows publishing nor ends an operator's override. It changes the finding
    /// only if it has differences.
    pub is_unsettled: bool,
}

impl AuditStep {
    /// Whether the step has audited everything that is new.
    fn is_current(&self) -> bool {
        !self.behind && !self.is_unsettled
    }
}

/// The last step at one joint.
#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct LastStep {
    /// The joint's name and deployment.
    pub joint: String,
    pub deployment_id: Option<Uuid>,
    /// The time since its end, by the database's clock.
    pub age_seconds: f64,
    /// Its duration.
    pub seconds: f64,
    /// Whether more new rows remained.
    pub is_behind: bool,
    /// Missing rows wait for a pass that begins after this one.
    pub awaited_pass: Option<i64>,
}

/// The joint and the instant of a step.
#[derive(Clone, Copy, Debug)]
pub struct AuditedJoint<'a> {
    pub joint: &'a str,
    /// The deployment of a joint that covers only one.
    pub deployment: Option<Uuid>,
    /// The ledger sequence up to which the joint is audited.
    pub sequence: Sequence,
    /// How long the step took; with the earlier step whose rows it judges.
    pub seconds: f64,
    /// How long a step that reached the newest batch allows publishing.
    pub good_for: Duration,
    /// Usage from this instant on is recent.
    pub recent_since: DateTime<Utc>,
}

impl AuditItem {
    /// A difference that is not usage of a source.
    #[must_use]
    pub fn difference(difference: Difference) -> Self {
        AuditItem {
            kind: difference.kind.into_owned(),
            id: difference.id,
            detail: difference.detail,
            is_open: false,
            is_recent_usage: false,
        }
    }
}

/// At most `limit` items of the joint, those judged longest ago first.
pub async fn due(
    conn: &mut PgConnection,
    joint: &str,
    deployment: Option<Uuid>,
    limit: i64,
) -> Result<Vec<AuditItem>, sqlx::Error> {
    sqlx::query_as(
        "select kind, id, detail, is_open, is_recent_usage from audit_item
         where joint = $1 and coalesce(deployment_id, '00000000-0000-0000-0000-000000000000') = $2 order by looked_at, id, kind limit $3",
    )
    .bind(joint)
    .bind(deployment.unwrap_or_default())
    .bind(limit)
    .fetch_all(conn)
    .await
}

/// The items of a joint of the whole ledger with these ids.
pub async fn of_ids(
    conn: &mut PgConnection,
    joint: &str,
    ids: &[String],
) -> Result<Vec<AuditItem>, sqlx::Error> {
    sqlx::query_as(
        "select kind, id, detail, is_open, is_recent_usage from audit_item
         where joint = $1 and coalesce(deployment_id, '00000000-0000-0000-0000-000000000000') = '00000000-0000-0000-0000-000000000000' and id = any($2)",
    )
    .bind(joint)
    .bind(ids)
    .fetch_all(conn)
    .await
}

/// The joint's progress; None before its first step.
pub async fn progress(
    conn: &mut PgConnection,
    joint: &str,
    deployment: Option<Uuid>,
) -> Result<Option<serde_json::Value>, sqlx::Error> {
    sqlx::query_scalar(
        "select progress from audit_progress where joint = $1 and coalesce(deployment_id, '00000000-0000-0000-0000-000000000000') = $2",
    )
    .bind(joint)
    .bind(deployment.unwrap_or_default())
    .fetch_optional(conn)
    .await
}

/// The last step at each joint.
pub async fn last_steps(conn: &mut PgConnection) -> Result<Vec<LastStep>, sqlx::Error> {
    sqlx::query_as(
        "select joint, deployment_id, extract(epoch from clock_timestamp() - stepped_at)::double precision as age_seconds,
             seconds, is_behind, (progress->>'awaited_pass')::bigint as awaited_pass
         from audit_progress where stepped_at is not null",
    )
    .fetch_all(conn)
    .await
}

/// Records a step: its items, its progress and the joint's finding. Only the holder of the lease
/// may. Reads all items of the joint; and all recent usage of the source, while any of it differs.
///
/// # Errors
/// [`LeaseError`]; nothing is written.
pub async fn record(
    conn: &mut PgConnection,
    lease: &Lease,
    of: &AuditedJoint<'_>,
    step: &AuditStep,
) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    replace(&mut tx, of, step).await?;
    save_progress(&mut tx, of.joint, of.deployment, &step.progress).await?;
    save_step(&mut tx, of, step).await?;
    if !step.is_unsettled || step.items.iter().any(|item| !item.is_open) {
        refresh(&mut tx, of, step).await?;
    }
    if step.is_current() {
        end_override(&mut tx, of.joint, of.deployment).await?;
    }
    Ok(tx.commit().await?)
}

async fn replace(
    tx: &mut PgConnection,
    of: &AuditedJoint<'_>,
    step: &AuditStep,
) -> Result<(), sqlx::Error> {
    let judged: Vec<&str> = step.judged.iter().map(String::as_str).collect();
    fn texts(items: &[AuditItem], of: fn(&AuditItem) -> &str) -> Vec<&str> {
        items.iter().map(of).collect()
    }
    let (kinds, ids) = (texts(&step.items, |item| &item.kind), texts(&step.items, |item| &item.id));
    sqlx::query(
        "delete from audit_item last where joint = $1 and coalesce(deployment_id, '00000000-0000-0000-0000-000000000000') = $2
             and id = any($3) and not exists (select from unnest($4::text[], $5::text[]) as now (kind, id) where now.kind = last.kind and now.id = last.id)",
    )
    .bind(of.joint)
    .bind(of.deployment.unwrap_or_default())
    .bind(judged)
    .bind(&kinds)
    .bind(&ids)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "insert into audit_item (joint, deployment_id, kind, id, detail, is_open, is_recent_usage, found_at, looked_at)
         select distinct on (kind, id) $1, $2, kind, id, detail, is_open, is_recent, clock_timestamp(), clock_timestamp()
         from unnest($3::text[], $4::text[], $5::text[], $6::boolean[], $7::boolean[]) as now (kind, id, detail, is_open, is_recent)
         on conflict (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000'), id, kind) do update set
             detail = excluded.detail, is_open = excluded.is_open, is_recent_usage = excluded.is_recent_usage, looked_at = excluded.looked_at",
    )
    .bind(of.joint)
    .bind(of.deployment)
    .bind(&kinds)
    .bind(&ids)
    .bind(texts(&step.items, |item| &item.detail))
    .bind(step.items.iter().map(|item| item.is_open).collect::<Vec<_>>())
    .bind(step.items.iter().map(|item| item.is_recent_usage).collect::<Vec<_>>())
    .execute(tx)
    .await?;
    Ok(())
}

/// Saves progress under a name of its own.
pub(super) async fn save_progress(
    conn: &mut PgConnection,
    joint: &str,
    deployment: Option<Uuid>,
    progress: &serde_json::Value,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into audit_progress (joint, deployment_id, progress) values ($1, $2, $3)
         on conflict (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000')) do update set progress = excluded.progress",
    )
    .bind(joint)
    .bind(deployment)
    .bind(Json(progress))
    .execute(conn)
    .await?;
    Ok(())
}

async fn save_step(
    tx: &mut PgConnection,
    of: &AuditedJoint<'_>,
    step: &AuditStep,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update audit_progress set stepped_at = clock_timestamp(), seconds = $3, is_behind = $4
         where joint = $1 and coalesce(deployment_id, '00000000-0000-0000-0000-000000000000') = $2",
    )
    .bind(of.joint)
    .bind(of.deployment.unwrap_or_default())
    .bind(of.seconds)
    .bind(step.behind)
    .execute(tx)
    .await?;
    Ok(())
}

/// Derives the joint's finding from its items. Only a step that is current prolongs the time until
/// which publishing is allowed.
async fn refresh(
    tx: &mut PgConnection,
    of: &AuditedJoint<'_>,
    step: &AuditStep,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "with item as materialized (
             select * from audit_item where joint = $1 and coalesce(deployment_id, '00000000-0000-0000-0000-000000000000') = coalesce($2::uuid, '00000000-0000-0000-0000-000000000000')
         ), counted as (
             select count(*) filter (where not is_open) as differences, count(*) filter (where is_open) as open,
                 count(*) filter (where is_recent_usage and not is_open) as recent from item
         )
         insert into audit_finding as last (joint, deployment_id, differences, open, gone, recent_usage_differs, recent_usage, examples,
             incarnation, sequence, audited_at, seconds, differs_since, good_until)
         select $1, $2, differences, open, $3, recent,
             case when recent > 0 then (select count(*) from source s join usage_as_of(9223372036854775807) u on u.source_id = s.id
                 where s.deployment_id = $2 and u.created_at >= $4) else 0 end,
             (select coalesce(jsonb_agg(jsonb_build_object('kind', kind, 'id', id, 'detail', detail) order by found_at, kind, id), '[]')
                 from (select * from item where not is_open order by found_at, kind, id limit $5) as first),
             $6, $7, clock_timestamp(), $8, case when differences > 0 then clock_timestamp() end,
             case when $9 then clock_timestamp() + make_interval(secs => $10) end
         from counted
         on conflict (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000')) do update set
             differences = excluded.differences, open = excluded.open, gone = excluded.gone, examples = excluded.examples,
             recent_usage_differs = excluded.recent_usage_differs, recent_usage = excluded.recent_usage,
             incarnation = excluded.incarnation, sequence = excluded.sequence, audited_at = excluded.audited_at, seconds = excluded.seconds,
             differs_since = case when excluded.differences > 0 then coalesce(last.differs_since, excluded.differs_since) end,
             good_until = coalesce(excluded.good_until, last.good_until)",
    )
    .bind(of.joint)
    .bind(of.deployment)
    .bind(step.gone)
    .bind(of.recent_since)
    .bind(EXAMPLES)
    .bind(of.sequence.incarnation)
    .bind(of.sequence.number)
    .bind(of.seconds)
    .bind(step.is_current())
    .bind(of.good_for.as_secs_f64())
    .execute(tx)
    .await?;
    Ok(())
}
