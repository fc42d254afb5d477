//! Reads completed builds: their keys and their rows.

use std::collections::HashSet;

use sqlx::FromRow;
use uuid::Uuid;

use super::connect::within;
use super::functions::Access;
use super::{Catalog, CoderdError, Reader, Time};

/// A completed job of type `workspace_build`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct BuildKey {
    /// `provisioner_jobs.id`
    pub job_id: Uuid,
    /// `provisioner_jobs.completed_at`
    pub completed_at: Time,
    /// `workspace_builds.id`; absent if the build was removed and its job remains
    pub build_id: Option<Uuid>,
}

/// The completed builds of a range of time, to see whether it has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromRow)]
pub struct RangeMark {
    /// Completed jobs of builds.
    pub jobs: i64,
    /// The sum of PostgreSQL's hashes of their ids.
    pub ids: i64,
}

impl RangeMark {
    /// The mark of two ranges together.
    #[must_use]
    pub fn plus(self, other: RangeMark) -> RangeMark {
        RangeMark {
            jobs: self.jobs.saturating_add(other.jobs),
            ids: self.ids.saturating_add(other.ids),
        }
    }
}

/// A completed build with its current names.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct BuildRow {
    /// `workspace_builds.id`
    pub build_id: Uuid,
    /// `workspace_builds.workspace_id`
    pub workspace_id: Uuid,
    /// `workspaces.organization_id`
    pub organization_id: Uuid,
    /// `workspaces.template_id`
    pub template_id: Uuid,
    /// `workspace_builds.template_version_id`
    pub template_version_id: Uuid,
    /// `workspace_builds.template_version_preset_id`
    pub preset_id: Option<Uuid>,
    /// `workspaces.owner_id`
    pub owner_id: Uuid,
    /// `workspace_builds.initiator_id`
    pub initiator_id: Uuid,
    /// `workspace_builds.transition`
    pub transition: String,
    /// `workspace_builds.reason`
    pub reason: String,
    /// `provisioner_jobs.job_status`
    pub status: String,
    /// `workspace_builds.build_number`
    pub build_number: i32,
    /// The job input's `prebuilt_workspace_stage`, as text: absent, `0`, `1`, `2`
    pub stage: Option<String>,
    /// The same for the workspace's build 1
    pub first_build_stage: Option<String>,
    /// The initiator of the workspace's build 1
    pub first_build_initiator_id: Option<Uuid>,
    /// A succeeded start without a succeeded start of a lower number
    pub first_successful_start: bool,
    /// `workspace_builds.has_ai_task`; absent if the column does not exist
    pub has_ai_task: Option<bool>,
    /// `workspace_builds.has_external_agent`
    pub has_external_agent: Option<bool>,
    /// `workspace_builds.daily_cost`
    pub daily_cost: i32,
    /// `provisioner_jobs.created_at`
    pub created_at: Time,
    /// `provisioner_jobs.started_at`
    pub started_at: Option<Time>,
    /// `provisioner_jobs.completed_at`
    pub completed_at: Time,
    /// `organizations.name`
    #[sqlx(default)]
    pub organization_name: String,
    /// `templates.name`
    #[sqlx(default)]
    pub template_name: String,
    /// `template_versions.name`
    #[sqlx(default)]
    pub template_version_name: String,
    /// `template_version_presets.name`; empty without a preset
    #[sqlx(default)]
    pub preset_name: String,
    /// `workspaces.name`
    pub workspace_name: String,
    /// `users.username` of the owner
    #[sqlx(default)]
    pub owner_name: String,
}

/// No index of `provisioner_jobs` is led by `completed_at`. The index on (`worker_id`,
/// `organization_id`, `completed_at` desc) serves one worker in one organization at a time. A loose
/// scan of the same index finds the workers with their organizations, one probe each: the daemons'
/// table forgets old workers. Jobs canceled while pending have no worker. They are found by
/// organization. (These are ordered by worker, too. The planner does not see that `is null` leaves
/// one value, and would sort all of them.)
macro_rules! workers {
    () => {
        "with recursive worker (worker_id, organization_id) as (
         (select worker_id, organization_id from provisioner_jobs
          where worker_id is not null order by worker_id, organization_id limit 1)
         union all
         select next.worker_id, next.organization_id
         from worker cross join lateral (
             select worker_id, organization_id from provisioner_jobs
             where (worker_id, organization_id) > (worker.worker_id, worker.organization_id)
             order by worker_id, organization_id limit 1
         ) next
     ),
     unassigned (organization_id) as (
         (select organization_id from provisioner_jobs where worker_id is null order by worker_id, organization_id limit 1)
         union all
         select next.organization_id
         from unassigned cross join lateral (
             select organization_id from provisioner_jobs
             where worker_id is null and organization_id > unassigned.organization_id
             order by worker_id, organization_id limit 1
         ) next
     )"
    };
}
pub(super) use workers;

/// `limit 1` keeps the look-up by index: the planner takes a page to be full, and would read the
/// whole table of builds for it. Each parameter is in a sub-select: its value does not change the
/// estimated cost, so PostgreSQL plans the statement a few times and not in each pass.
///
/// Builds after the key (`$1`, `$2`) and completed at or before `$4`, at most `$3`.
const KEYS_BY_TIME: &str = concat!(
    workers!(),
    "
     select done.id as job_id, done.completed_at, build.id as build_id
     from (
         select job.id, job.completed_at
         from worker cross join lateral (
             select id, completed_at from provisioner_jobs
             where worker_id = worker.worker_id and organization_id = worker.organization_id
                 and completed_at >= (select $1) and (completed_at, id) > ((select $1), (select $2)) and completed_at <= (select $4) and type = 'workspace_build'
             order by completed_at, id limit (select $3)
         ) job
         union all
         select job.id, job.completed_at
         from unassigned cross join lateral (
             select id, completed_at from provisioner_jobs
             where worker_id is null and organization_id = unassigned.organization_id
                 and completed_at >= (select $1) and (completed_at, id) > ((select $1), (select $2)) and completed_at <= (select $4) and type = 'workspace_build'
             order by completed_at, id limit (select $3)
         ) job
         order by completed_at, id limit (select $3)
     ) done
     left join lateral (select id from workspace_builds where job_id = done.id limit 1) build on true
     order by done.completed_at, done.id"
);

/// The marks of the ranges from `$1` until before `$2`, in their order. It reads each row of them, but
/// sorts and returns none. It is planned as [`KEYS_BY_TIME`] is.
const RANGE_MARKS: &str = concat!(
    workers!(),
    ",
     range as (select since, until, number from unnest((select $1::timestamptz[]), (select $2::timestamptz[])) with ordinality as asked (since, until, number))
     select coalesce(sum(jobs), 0)::bigint as jobs, coalesce(sum(ids), 0)::bigint as ids
     from range left join lateral (
         select found.* from worker cross join lateral (
             select count(*) as jobs, sum(uuid_hash(id)) as ids from provisioner_jobs
             where worker_id = worker.worker_id and organization_id = worker.organization_id
                 and completed_at >= range.since and completed_at < range.until and type = 'workspace_build'
         ) found
         union all
         select found.* from unassigned cross join lateral (
             select count(*) as jobs, sum(uuid_hash(id)) as ids from provisioner_jobs
             where worker_id is null and organization_id = unassigned.organization_id
                 and completed_at >= range.since and completed_at < range.until and type = 'workspace_build'
         ) found
     ) counted on true
     group by number order by number"
);

/// The prebuild stages of the jobs of these builds and of the first builds of their workspaces.
macro_rules! stages {
    (Function) => {
        "select job_id, stage from tallyline.job_stages(array(select job_id from build union select first_job_id from build))"
    };
    (Tables) => {
        "select job.id as job_id, job.stage
         from (select job_id from build union select first_job_id from build) asked
         cross join lateral (
             select id, input ->> 'prebuilt_workspace_stage' as stage from provisioner_jobs where id = asked.job_id and type = 'workspace_build' limit 1
         ) job"
    };
}

/// `provisioner_state` can be megabytes: columns are always named. Foreign keys guarantee the
/// workspace. Each `limit 1` makes a look-up by index that the planner cannot exchange for a read
/// of a whole table.
macro_rules! build_rows {
    ($has_ai_task:literal, $access:ident) => {
        concat!(
            "with build as materialized (
                 select build.id as build_id, build.workspace_id, workspaces.organization_id, workspaces.template_id, build.template_version_id,
                     build.template_version_preset_id as preset_id, workspaces.owner_id, build.initiator_id, build.transition::text as transition,
                     build.reason::text as reason, job.job_status::text as status, build.build_number, workspaces.name as workspace_name,
                     build.job_id, first_build.job_id as first_job_id, first_build.initiator_id as first_build_initiator_id,
                     build.transition = 'start' and job.job_status = 'succeeded' and not exists (
                         select from workspace_builds earlier join provisioner_jobs earlier_job on earlier_job.id = earlier.job_id
                         where earlier.workspace_id = build.workspace_id and earlier.build_number < build.build_number
                             and earlier.transition = 'start' and earlier_job.job_status = 'succeeded'
                     ) as first_successful_start,
                     build.has_ai_task, build.has_external_agent, build.daily_cost, job.created_at, job.started_at, job.completed_at
                 from unnest($1::uuid[]) asked (id)
                 cross join lateral (
                     select id, workspace_id, template_version_id, template_version_preset_id, initiator_id, transition, reason, build_number, job_id, ",
            $has_ai_task,
            " as has_ai_task, has_external_agent, daily_cost
                     from workspace_builds where id = asked.id limit 1
                 ) build
                 cross join lateral (
                     select job_status, created_at, started_at, completed_at from provisioner_jobs
                     where id = build.job_id and completed_at is not null limit 1
                 ) job
                 cross join lateral (
                     select organization_id, template_id, owner_id, name from workspaces where id = build.workspace_id limit 1
                 ) workspaces
                 left join lateral (
                     select job_id, initiator_id from workspace_builds where workspace_id = build.workspace_id and build_number = 1 limit 1
                 ) first_build on true
             ),
             stage as materialized (
                 ",
            stages!($access),
            "
             )
             select build.*, stage.stage, first_stage.stage as first_build_stage
             from build
             left join stage on stage.job_id = build.job_id
             left join stage first_stage on first_stage.job_id = build.first_job_id"
        )
    };
}

impl Reader {
    /// A page of the builds after the key `after`, by (`completed_at`, job id). The first `after`
    /// is the lower bound and the nil id.
    pub async fn recent_build_keys(
        &mut self,
        after: (Time, Uuid),
        limit: i64,
    ) -> Result<Vec<BuildKey>, CoderdError> {
        self.build_keys_until(after, Time::INFINITY, limit).await
    }

    /// The same, of builds completed at or before `until`.
    pub async fn build_keys_until(
        &mut self,
        after: (Time, Uuid),
        until: Time,
        limit: i64,
    ) -> Result<Vec<BuildKey>, CoderdError> {
        let query =
            sqlx::query_as(KEYS_BY_TIME).bind(after.0).bind(after.1).bind(limit).bind(until);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// The marks of these ranges of time, each from its first time until before its second.
    pub async fn range_marks(
        &mut self,
        ranges: &[(Time, Time)],
    ) -> Result<Vec<RangeMark>, CoderdError> {
        let (since, until): (Vec<Time>, Vec<Time>) = ranges.iter().copied().unzip();
        let query = sqlx::query_as(RANGE_MARKS).bind(since).bind(until);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// A page of all completed builds after the job id `after`, by job id.
    pub async fn build_keys(
        &mut self,
        after: Uuid,
        limit: i64,
    ) -> Result<Vec<BuildKey>, CoderdError> {
        let query = sqlx::query_as(
            "select job.id as job_id, job.completed_at, build.id as build_id
                 from (
                     select id, completed_at from provisioner_jobs
                     where id > $1 and type = 'workspace_build' and completed_at is not null order by id limit $2
                 ) job
                 left join workspace_builds build on build.job_id = job.id
                 order by job.id",
        )
        .bind(after)
        .bind(limit);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// The keys of these builds, if they exist and are completed, by build id.
    pub async fn build_keys_of(
        &mut self,
        build_ids: &[Uuid],
    ) -> Result<Vec<BuildKey>, CoderdError> {
        let query = "select job.id as job_id, job.completed_at, build.id as build_id
             from workspace_builds build join provisioner_jobs job on job.id = build.job_id
             where build.id = any($1) and job.completed_at is not null order by build.id";
        within(self.deadline, sqlx::query_as(query).bind(build_ids).fetch_all(&mut self.connection))
            .await
    }

    /// The rows of these builds, by time and id, without those that coderd has removed since. Ids in
    /// the order of completion cost coderd less: it finds their rows together.
    pub async fn builds(
        &mut self,
        catalog: &Catalog,
        build_ids: &[Uuid],
    ) -> Result<Vec<BuildRow>, CoderdError> {
        let query = match (catalog.has_ai_task, catalog.stages) {
            (true, Access::Function) => build_rows!("has_ai_task", Function),
            (false, Access::Function) => build_rows!("null::boolean", Function),
            (true, Access::Tables) => build_rows!("has_ai_task", Tables),
            (false, Access::Tables) => build_rows!("null::boolean", Tables),
        };
        let mut asked = HashSet::new();
        let ids: Vec<Uuid> = build_ids.iter().copied().filter(|id| asked.insert(*id)).collect();
        let query = sqlx::query_as(query).bind(ids);
        let mut rows: Vec<BuildRow> =
            within(self.deadline, query.fetch_all(&mut self.connection)).await?;
        rows.sort_unstable_by_key(|row| (row.completed_at, row.build_id));
        self.with_names(rows).await
    }
}
