//! Digests of many rows that coderd's database computes itself, so that equal rows need not be
//! fetched.
//!
//! The digest of a row is the event's own digest (`event/envelope.rs`). The digest of many rows is
//! SHA-256 over their digests in order of their bytes: no collation, no session setting and no key
//! takes part, and rows that differ cannot cancel out. A row that may not be a valid event is odd:
//! it is left out and named.

use sqlx::FromRow;
use uuid::Uuid;

use super::builds::workers;
use super::connect::within;
use super::functions::Access;
use super::{Catalog, CoderdError, Reader, Time};

/// The builds of a slice of time.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct BuildSlice {
    /// Completed jobs of builds, also those without a build.
    pub jobs: i64,
    /// The latest completion of these jobs.
    pub last_at: Option<Time>,
    pub builds: i64,
    pub builds_digest: Vec<u8>,
    /// Prebuild claims among the builds.
    pub claims: i64,
    pub claims_digest: Vec<u8>,
    /// Builds that may not be valid events.
    pub odd: Vec<Uuid>,
}

/// Usage rows of a page.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct UsagePage {
    pub rows: i64,
    pub digest: Vec<u8>,
    /// Rows that may not be valid events.
    pub odd: Vec<String>,
}

/// A text in the digest's form: its length and its bytes.
macro_rules! text {
    ($value:literal) => {
        concat!("int8send(octet_length(", $value, ")) || convert_to(", $value, ", 'UTF8')")
    };
}

/// A constant text in the digest's form, which the planner computes once.
macro_rules! word {
    ($value:literal) => {
        concat!("int8send(octet_length('", $value, "')) || '", $value, "'::bytea")
    };
}

/// A time in the digest's form.
macro_rules! time {
    ($value:literal) => {
        concat!("int8send((extract(epoch from ", $value, ") * 1000000)::bigint)")
    };
}

/// Whether an event can have this time: the years of `event/fields.rs`.
macro_rules! countable {
    ($value:literal) => {
        concat!($value, " >= '1970-01-01 00:00:00+00' and ", $value, " < '10000-01-01 00:00:00+00'")
    };
}

/// A digest of many digests, and their number.
macro_rules! digest_of {
    ($digest:literal) => {
        concat!(
            "sha256(coalesce(string_agg(",
            $digest,
            ", ''::bytea order by ",
            $digest,
            "), ''::bytea))"
        )
    };
}

/// The stage of a build in the row of its job; null: it is read otherwise.
macro_rules! job_stage {
    (Function) => {
        "null::text"
    };
    (Tables) => {
        "input ->> 'prebuilt_workspace_stage'"
    };
}

/// The other stages: of the first builds that decide whether a build is a claim, and of all builds
/// if the jobs do not show them.
macro_rules! stages {
    (Function) => {
        "select job_id, stage from tallyline.job_stages(array(select job_id from build) || array(select job_id from first_build))"
    };
    (Tables) => {
        "select distinct first_build.job_id, job.stage
         from first_build cross join lateral (
             select input ->> 'prebuilt_workspace_stage' as stage from provisioner_jobs where id = first_build.job_id and type = 'workspace_build' limit 1
         ) job"
    };
}

/// Jobs completed from `$1` to `$2`, both included, at most `$3` of them. Each `limit 1` keeps a
/// look-up by index: the planner takes a slice to be full, and would read whole tables for it.
macro_rules! build_slice {
    ($access:ident) => {
        concat!(
            workers!(),
            ",
     job as materialized (
         select * from (
             select job.* from worker cross join lateral (
                 select id, created_at, started_at, completed_at, job_status::text as status, ",
            job_stage!($access),
            " as stage from provisioner_jobs
                 where worker_id = worker.worker_id and organization_id = worker.organization_id
                     and completed_at >= $1 and completed_at <= $2 and type = 'workspace_build'
                 order by completed_at, id limit $3
             ) job
             union all
             select job.* from unassigned cross join lateral (
                 select id, created_at, started_at, completed_at, job_status::text as status, ",
            job_stage!($access),
            " as stage from provisioner_jobs
                 where worker_id is null and organization_id = unassigned.organization_id
                     and completed_at >= $1 and completed_at <= $2 and type = 'workspace_build'
                 order by completed_at, id limit $3
             ) job
         ) job order by completed_at, id limit $3
     ),
     build as materialized (
         select job.id as job_id, build.id as build_id, build.workspace_id, workspaces.organization_id, build.template_version_id, build.initiator_id,
             build.build_number, build.transition::text as transition, job.created_at, job.started_at, job.completed_at, job.status, job.stage as job_stage
         from job
         cross join lateral (
             select id, workspace_id, template_version_id, initiator_id, build_number, transition from workspace_builds where job_id = job.id limit 1
         ) build
         cross join lateral (select organization_id from workspaces where id = build.workspace_id limit 1) workspaces
     ),
     first_build as materialized (
         select build.build_id as of_build_id, first_build.*
         from build cross join lateral (
             select initiator_id, job_id from workspace_builds where workspace_id = build.workspace_id and build_number = 1 limit 1
         ) first_build
         where build.build_number = 2 and build.transition = 'start'
     ),
     stage as materialized (
         ",
            stages!($access),
            "
     ),
     staged as (
         select build.*, coalesce(build.job_stage, stage.stage, '0') as stage, first_build.initiator_id as first_initiator_id, coalesce(first_stage.stage, '0') as first_stage
         from build
         left join stage on stage.job_id = build.job_id
         left join first_build on first_build.of_build_id = build.build_id
         left join stage first_stage on first_stage.job_id = first_build.job_id
     ),
     judged as (
         select *,
             stage in ('0', '1', '2') and transition in ('start', 'stop', 'delete') and status in ('succeeded', 'failed', 'canceled')
                 and ",
            countable!("created_at"),
            " and (started_at is null or ",
            countable!("started_at"),
            ") and ",
            countable!("completed_at"),
            " as is_plain,
             transition = 'start' and (stage = '2' or stage = '0' and build_number = 2
                 and first_initiator_id = 'c42fdf75-3097-471c-8c33-fb52454d81c0' and first_stage = '0') as is_claim
         from staged
     ),
     -- the case keeps times without a number of microseconds out of the arithmetic
     formed as (
         select *,
             case when is_plain then uuid_send(build_id) || uuid_send(workspace_id) || uuid_send(organization_id)
                 || uuid_send(template_version_id) || uuid_send(initiator_id) || int8send(build_number) end as head,
             case when is_plain then case stage when '1' then '\\x01'::bytea || ",
            word!("create"),
            " when '2' then '\\x01'::bytea || ",
            word!("claim"),
            " else '\\x00'::bytea end
                 || ",
            time!("created_at"),
            " || case when started_at is null then '\\x00'::bytea else '\\x01'::bytea || ",
            time!("started_at"),
            " end || ",
            time!("completed_at"),
            " || ",
            text!("status"),
            " end as tail
         from judged
     ),
     digest as materialized (
         select build_id, is_plain, sha256(",
            word!("tallyline.digest.v1"),
            " || ",
            word!("workspace_build_completed_v1"),
            " || head || ",
            text!("transition"),
            " || tail) as build,
             case when is_claim then sha256(",
            word!("tallyline.digest.v1"),
            " || ",
            word!("prebuild_claimed_v1"),
            " || head || tail) end as claim
         from formed
     )
     select (select count(*) from job) as jobs, (select max(completed_at) from job) as last_at,
         count(build) as builds, ",
            digest_of!("build"),
            " as builds_digest, count(claim) as claims, ",
            digest_of!("claim"),
            " as claims_digest, coalesce(array_agg(build_id) filter (where not is_plain), '{}') as odd
     from digest"
        )
    };
}

/// The usage rows of these ids. A number of up to 18 digits is surely within the limits of each
/// type.
const USAGE_PAGE: &str = concat!(
    "with found as (
         select usage.id, event_type, event_data, created_at, case event_type when 'hb_agent_runtime_v1' then 'runtime_ms'
             when 'hb_ai_seats_v1' then 'count' when 'dc_managed_agents_v1' then 'count' end as field
         from unnest($1::text[]) as asked (id)
         cross join lateral (select id, event_type, event_data, created_at from usage_events where id = asked.id limit 1) usage
     ),
     read as (
         select id, event_type, created_at, case when field is not null and jsonb_typeof(event_data -> field) = 'number'
                 and event_data ->> field ~ '^(0|[1-9][0-9]{0,17})$' and (event_type <> 'dc_managed_agents_v1' or event_data ->> field <> '0')
             then case when event_data = jsonb_build_object(field, event_data -> field) then (event_data ->> field)::bigint end end as number
         from found
     ),
     digest as materialized (
         select id, case when number is not null and ",
    countable!("created_at"),
    " then sha256(",
    word!("tallyline.digest.v1"),
    " || ",
    text!("event_type"),
    " || ",
    text!("id"),
    " || int8send(number) || ",
    time!("created_at"),
    ") end as usage from read
     )
     select count(*) as rows, ",
    digest_of!("usage"),
    " as digest, coalesce(array_agg(id) filter (where usage is null), '{}') as odd from digest"
);

impl Reader {
    /// The digest of the builds completed from `from` to `until`, both included. It takes the first
    /// `limit` jobs: then later ones may be missing. It reads only these jobs and their builds.
    pub async fn build_slice(
        &mut self,
        catalog: &Catalog,
        from: Time,
        until: Time,
        limit: i64,
    ) -> Result<BuildSlice, CoderdError> {
        let query = match catalog.stages {
            Access::Function => build_slice!(Function),
            Access::Tables => build_slice!(Tables),
        };
        let query = sqlx::query_as(query).bind(from).bind(until).bind(limit);
        within(self.deadline, query.fetch_one(&mut self.connection)).await
    }

    /// The digest of the usage rows of these ids. Missing ids are left out.
    pub async fn usage_page(&mut self, ids: &[String]) -> Result<UsagePage, CoderdError> {
        let query = sqlx::query_as(USAGE_PAGE).bind(ids);
        within(self.deadline, query.fetch_one(&mut self.connection)).await
    }
}
