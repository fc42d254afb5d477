//! Reads completed builds: their keys and their rows.

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
    pub organization_name: String,
    /// `templates.name`
    pub template_name: String,
    /// `template_versions.name`
    pub template_version_name: String,
    /// `template_version_presets.name`; empty without a preset
    pub preset_name: String,
    /// `workspaces.name`
    pub workspace_name: String,
    /// `users.username` of the owner
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
/// whole table of builds for it.
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
                 and completed_at >= $1 and (completed_at, id) > ($1, $2) and completed_at <= $4 and type = 'workspace_build'
             order by completed_at, id limit $3
         ) job
         union all
         select job.id, job.completed_at
         from unassigned cross join lateral (
             select id, completed_at from provisioner_jobs
             where worker_id is null and organization_id = unassigned.organization_id
                 and completed_at >= $1 and (completed_at, id) > ($1, $2) and completed_at <= $4 and type = 'workspace_build'
             order by completed_at, id limit $3
         ) job
         order by completed_at, id limit $3
     ) done
     left join lateral (select id from workspace_builds where job_id = done.id limit 1) build on true
     order by done.completed_at, done.id"
);

/// The prebuild stages of these builds and of the first builds of their workspaces.
macro_rules! stages {
    (Function) => {
        "select build_id, stage from tallyline.prebuild_stages($1 || array(select id from first_build))"
    };
    (Tables) => {
        "select build.id as build_id, job.input ->> 'prebuilt_workspace_stage' as stage
         from workspace_builds build join provisioner_jobs job on job.id = build.job_id
         where build.id = any($1 || array(select id from first_build)) and job.type = 'workspace_build'"
    };
}

/// `provisioner_state` can be megabytes: columns are always named. Foreign keys guarantee
/// workspace, organization, template and owner.
macro_rules! build_rows {
    ($has_ai_task:literal, $access:ident) => {
        concat!(
            "with first_build as (
                 select build.id as of_build_id, first_build.id, first_build.initiator_id
                 from workspace_builds build
                 join workspace_builds first_build on first_build.workspace_id = build.workspace_id and first_build.build_number = 1
                 where build.id = any($1)
             ),
             stage as materialized (
                 ",
            stages!($access),
            "
             )
             select build.id as build_id, build.workspace_id, workspaces.organization_id, workspaces.template_id, build.template_version_id,
                 build.template_version_preset_id as preset_id, workspaces.owner_id, build.initiator_id,
                 build.transition::text as transition, build.reason::text as reason, job.job_status::text as status, build.build_number,
                 stage.stage, first_stage.stage as first_build_stage, first_build.initiator_id as first_build_initiator_id,
                 build.transition = 'start' and job.job_status = 'succeeded' and not exists (
                     select from workspace_builds earlier join provisioner_jobs earlier_job on earlier_job.id = earlier.job_id
                     where earlier.workspace_id = build.workspace_id and earlier.build_number < build.build_number
                         and earlier.transition = 'start' and earlier_job.job_status = 'succeeded'
                 ) as first_successful_start,
                 ",
            $has_ai_task,
            " as has_ai_task, build.has_external_agent, build.daily_cost, job.created_at, job.started_at, job.completed_at,
                 organizations.name as organization_name, templates.name as template_name, version.name as template_version_name,
                 coalesce(preset.name, '') as preset_name, workspaces.name as workspace_name, owner.username as owner_name
             from workspace_builds build
             join provisioner_jobs job on job.id = build.job_id
             join workspaces on workspaces.id = build.workspace_id
             join organizations on organizations.id = workspaces.organization_id
             join templates on templates.id = workspaces.template_id
             join template_versions version on version.id = build.template_version_id
             join users owner on owner.id = workspaces.owner_id
             left join template_version_presets preset on preset.id = build.template_version_preset_id
             left join stage on stage.build_id = build.id
             left join first_build on first_build.of_build_id = build.id
             left join stage first_stage on first_stage.build_id = first_build.id
             where build.id = any($1) and job.completed_at is not null
             order by job.completed_at, build.id"
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

    /// The rows of these builds, by time and id, without those that coderd has removed since.
    pub async fn builds(
        &mut self,
        catalog: &Catalog,
        build_ids: &[Uuid],
    ) -> Result<Vec<BuildRow>, CoderdError> {
        let query = match (catalog.has_ai_task, catalog.stages) {
            (true, Access::Function) => build_rows!("build.has_ai_task", Function),
            (false, Access::Function) => build_rows!("null::boolean", Function),
            (true, Access::Tables) => build_rows!("build.has_ai_task", Tables),
            (false, Access::Tables) => build_rows!("null::boolean", Tables),
        };
        within(self.deadline, sqlx::query_as(query).bind(build_ids).fetch_all(&mut self.connection))
            .await
    }
}
