//! The second oracle: the numbers that coderd would show, by coderd's own predicates as SQL over
//! its tables.
//!
//! It follows the reference, section by section, and shares no code with the simulator's
//! bookkeeping or Tallyline's stages. It counts by ids and adds names as first seen from a map,
//! because coderd's own are current. Deleted templates are included; coderd would drop them.

// Some test compares each number; which are used depends on the tests.
#![allow(dead_code)]

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tallyline_sim::coderd::truth::{CreationType, Labels};
use uuid::Uuid;

/// Names of each build's organization, template and preset as first seen.
pub type Names = BTreeMap<Uuid, Labels>;

/// `coderd_workspace_creation_total` (3.2): the succeeded start build with the lowest number of
/// each workspace. It is counted if its initiator is not the prebuilds user, under the names of
/// that build.
pub async fn creation_totals(coderd: &PgPool, names: &Names) -> BTreeMap<Labels, u64> {
    let builds: Vec<Uuid> = sqlx::query_scalar(
        "select first.id
         from (
             select distinct on (build.workspace_id) build.id, build.workspace_id, build.initiator_id
             from workspace_builds build
             join provisioner_jobs job on job.id = build.job_id
             where build.transition = 'start' and job.job_status = 'succeeded'
             order by build.workspace_id, build.build_number, build.id
         ) first
         join workspaces workspace on workspace.id = first.workspace_id
         join templates template on template.id = workspace.template_id
         join organizations organization on organization.id = workspace.organization_id
         where first.initiator_id <> 'c42fdf75-3097-471c-8c33-fb52454d81c0'",
    )
    .fetch_all(coderd)
    .await
    .expect("first successful start builds");
    let mut totals = BTreeMap::new();
    for build in builds {
        *totals.entry(names[&build].clone()).or_default() += 1;
    }
    totals
}

/// A build that coderd's timing metrics observe.
#[derive(sqlx::FromRow)]
struct Timed {
    id: Uuid,
    class: String,
    micros: i64,
}

/// Succeeded start builds by class (2.3: prebuild before claim before first build), with unclamped
/// durations, in order of completion.
async fn timed(coderd: &PgPool, introduced: DateTime<Utc>) -> Vec<Timed> {
    sqlx::query_as(
        "select id, class, micros from (
             select build.id, job.completed_at,
                 (extract(epoch from job.completed_at - job.started_at) * 1000000)::bigint as micros,
                 case
                     when job.input ->> 'prebuilt_workspace_stage' = '1' then 'prebuild'
                     when build.build_number = 1 and build.initiator_id = 'c42fdf75-3097-471c-8c33-fb52454d81c0' then 'prebuild'
                     when job.input ->> 'prebuilt_workspace_stage' = '2' then 'claim'
                     when build.build_number = 2 and first.initiator_id = 'c42fdf75-3097-471c-8c33-fb52454d81c0' then 'claim'
                     when build.build_number = 1 then 'regular'
                 end as class
             from workspace_builds build
             join provisioner_jobs job on job.id = build.job_id
             join workspace_builds first on first.workspace_id = build.workspace_id and first.build_number = 1
             where job.type = 'workspace_build' and build.transition = 'start' and job.job_status = 'succeeded'
                 and job.started_at is not null
         ) timed
         where class is not null and completed_at >= $1
         order by completed_at, id",
    )
    .bind(introduced)
    .fetch_all(coderd)
    .await
    .expect("timed builds")
}

/// The observations of `coderd_workspace_creation_duration_seconds` from `introduced` on, in
/// microseconds. Negative durations are 0, as Tallyline shows them.
pub async fn creation_micros(
    coderd: &PgPool,
    names: &Names,
    introduced: DateTime<Utc>,
) -> BTreeMap<(Labels, CreationType), Vec<u64>> {
    let mut series: BTreeMap<_, Vec<u64>> = BTreeMap::new();
    for build in timed(coderd, introduced).await {
        let kind = match build.class.as_str() {
            "regular" => CreationType::Regular,
            "prebuild" => CreationType::Prebuild,
            _ => continue,
        };
        series
            .entry((names[&build.id].clone(), kind))
            .or_default()
            .push(build.micros.try_into().unwrap_or(0));
    }
    series
}

/// The observations of `coderd_prebuilt_workspace_claim_duration_seconds` from `introduced` on, in
/// microseconds; negative ones are 0.
pub async fn claim_micros(
    coderd: &PgPool,
    names: &Names,
    introduced: DateTime<Utc>,
) -> BTreeMap<Labels, Vec<u64>> {
    let mut series: BTreeMap<_, Vec<u64>> = BTreeMap::new();
    for build in timed(coderd, introduced).await.into_iter().filter(|build| build.class == "claim")
    {
        series
            .entry(names[&build.id].clone())
            .or_default()
            .push(build.micros.try_into().unwrap_or(0));
    }
    series
}

/// The number of timed builds with a negative duration in coderd.
pub async fn clock_skews(coderd: &PgPool) -> usize {
    timed(coderd, DateTime::UNIX_EPOCH).await.iter().filter(|build| build.micros < 0).count()
}

/// Timed builds from `introduced` on with a negative duration in coderd, by organization.
/// Organizations without any are left out.
pub async fn negative_durations(
    coderd: &PgPool,
    names: &Names,
    introduced: DateTime<Utc>,
) -> BTreeMap<String, u64> {
    let mut negative = BTreeMap::new();
    for build in timed(coderd, introduced).await.into_iter().filter(|build| build.micros < 0) {
        *negative.entry(names[&build.id].organization_name.clone()).or_default() += 1;
    }
    negative
}

/// A license's `actual` in coderd (6.6): the daily rollup between the UTC dates of the window's
/// start and end, both whole.
pub async fn managed_agents_in_whole_days(
    coderd: &PgPool,
    start: DateTime<Utc>,
    end: DateTime<Utc>,
) -> i64 {
    sqlx::query_scalar(
        "select coalesce(sum((usage_data ->> 'count')::bigint), 0)::bigint
         from usage_events_daily
         where event_type = 'dc_managed_agents_v1'
             and day between ($1::timestamptz at time zone 'UTC')::date and ($2::timestamptz at time zone 'UTC')::date",
    )
    .bind(start)
    .bind(end)
    .fetch_one(coderd)
    .await
    .expect("rollup of managed agents")
}

/// The runtime total of a window (6.7): rows whose bucket begins in it, half-open.
pub async fn agent_runtime_ms(coderd: &PgPool, start: DateTime<Utc>, end: DateTime<Utc>) -> i64 {
    sqlx::query_scalar(
        "select coalesce(sum((event_data ->> 'runtime_ms')::bigint), 0)::bigint
         from usage_events
         where event_type = 'hb_agent_runtime_v1' and created_at >= $1 and created_at < $2",
    )
    .bind(start)
    .bind(end)
    .fetch_one(coderd)
    .await
    .expect("runtime of a window")
}

/// Active AI seats (4.3).
pub async fn active_seats(coderd: &PgPool) -> i64 {
    sqlx::query_scalar(
        "select count(*) from ai_seat_state seat join users on users.id = seat.user_id
         where users.status = 'active' and not users.deleted and not users.is_system",
    )
    .fetch_one(coderd)
    .await
    .expect("active seats")
}

/// The states of a usage row (1.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum UsageState {
    Pending,
    PendingAfterFailure,
    Claimed,
    ClaimAbandoned,
    Accepted,
    Refused,
}

pub async fn usage_states(coderd: &PgPool, now: DateTime<Utc>) -> BTreeMap<String, UsageState> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "select id, case
             when published_at is not null and failure_message is null then 'accepted'
             when published_at is not null then 'refused'
             when publish_started_at > $1 - interval '1 hour' then 'claimed'
             when publish_started_at is not null then 'claim abandoned'
             when failure_message is not null then 'pending after failure'
             else 'pending'
         end from usage_events",
    )
    .bind(now)
    .fetch_all(coderd)
    .await
    .expect("states of usage rows");
    let state = |name: &str| match name {
        "accepted" => UsageState::Accepted,
        "refused" => UsageState::Refused,
        "claimed" => UsageState::Claimed,
        "claim abandoned" => UsageState::ClaimAbandoned,
        "pending after failure" => UsageState::PendingAfterFailure,
        _ => UsageState::Pending,
    };
    rows.into_iter().map(|(id, name)| (id, state(&name))).collect()
}

/// coderd's publisher gauges (3.4).
#[derive(Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct PublisherGauges {
    /// Unpublished and younger than 30 days.
    pub pending: i64,
    /// The oldest of those.
    pub oldest: Option<DateTime<Utc>>,
    /// Unpublished, 30 to 60 days old.
    pub expired: i64,
}

pub async fn publisher_gauges(coderd: &PgPool, now: DateTime<Utc>) -> PublisherGauges {
    sqlx::query_as(
        "select count(*) filter (where created_at > $1 - interval '30 days') as pending,
             min(created_at) filter (where created_at > $1 - interval '30 days') as oldest,
             count(*) filter (where created_at <= $1 - interval '30 days') as expired
         from usage_events where published_at is null and created_at > $1 - interval '60 days'",
    )
    .bind(now)
    .fetch_one(coderd)
    .await
    .expect("publisher gauges")
}
