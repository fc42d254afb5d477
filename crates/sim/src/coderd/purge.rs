//! coderd removes old builds. They stay readable in a separate schema, for an oracle that must
//! still count them.

use anyhow::Context;
use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::config::PREBUILDS_USER;
use super::planning::Existing;

/// With this search path coderd's own queries read builds and jobs as if none had been removed.
pub const SEARCH_PATH_BEFORE_PURGES: &str = "before_purges, public";

/// The builds that a purge removes.
#[derive(Clone, Copy, Debug)]
pub struct Purge {
    /// Builds that completed before this.
    pub completed_before: DateTime<Utc>,
    /// Whether their jobs are removed, too.
    pub jobs_too: bool,
    /// The most workspaces that lost builds and restart.
    pub restarts: i64,
}

/// Removes the builds. Returns their ids.
pub(super) async fn remove(tx: &mut PgConnection, purge: Purge) -> anyhow::Result<Vec<Uuid>> {
    sqlx::raw_sql(
        "create schema if not exists before_purges;
         create table if not exists before_purges.removed_build (like workspace_builds);
         create table if not exists before_purges.removed_job (like provisioner_jobs);
         create or replace view before_purges.workspace_builds as
             select * from public.workspace_builds union all select * from before_purges.removed_build;
         create or replace view before_purges.provisioner_jobs as
             select * from public.provisioner_jobs union all select * from before_purges.removed_job;",
    )
    .execute(&mut *tx)
    .await
    .context("schema before_purges")?;
    let removed: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "with removed as (
             delete from workspace_builds build using provisioner_jobs job
             where job.id = build.job_id and job.completed_at < $1
             returning build.*
         ), remembered as (insert into before_purges.removed_build select * from removed)
         select id, job_id from removed",
    )
    .bind(purge.completed_before)
    .fetch_all(&mut *tx)
    .await
    .context("remove builds")?;
    if purge.jobs_too {
        let jobs: Vec<Uuid> = removed.iter().map(|(_, job)| *job).collect();
        sqlx::query(
            "with removed as (delete from provisioner_jobs where id = any($1) returning *)
             insert into before_purges.removed_job select * from removed",
        )
        .bind(jobs)
        .execute(&mut *tx)
        .await
        .context("remove jobs")?;
    }
    Ok(removed.into_iter().map(|(build, _)| build).collect())
}

/// Workspaces of users that lost the build of their first start and have no incomplete build.
pub(super) async fn workspaces_without_first_start(
    tx: &mut PgConnection,
    limit: i64,
) -> anyhow::Result<Vec<Existing>> {
    #[derive(FromRow)]
    struct Row {
        id: Uuid,
        owner_id: Uuid,
        template_id: Uuid,
        builds: i32,
    }
    let rows: Vec<Row> = sqlx::query_as(
        "select workspace.id, workspace.owner_id, workspace.template_id, max(build.build_number) as builds
         from workspaces workspace
         join before_purges.workspace_builds build on build.workspace_id = workspace.id
         join before_purges.provisioner_jobs job on job.id = build.job_id
         where not workspace.deleted and workspace.owner_id <> $1
         group by workspace.id
         having bool_and(job.completed_at is not null)
             and bool_or(build.transition = 'start' and job.job_status = 'succeeded')
             and not exists (
                 select from workspace_builds remaining join provisioner_jobs remaining_job on remaining_job.id = remaining.job_id
                 where remaining.workspace_id = workspace.id and remaining.transition = 'start' and remaining_job.job_status = 'succeeded'
             )
         order by workspace.id
         limit $2",
    )
    .bind(PREBUILDS_USER)
    .bind(limit)
    .fetch_all(tx)
    .await
    .context("workspaces that lost builds")?;
    let existing = |row: Row| Existing {
        workspace: row.id,
        owner: row.owner_id,
        template: row.template_id,
        builds: row.builds,
    };
    Ok(rows.into_iter().map(existing).collect())
}
