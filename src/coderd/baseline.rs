//! coderd's own count of creations up to an instant, for a source whose earlier history is not
//! collected.

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use uuid::Uuid;

use super::connect::within;
use super::{CoderdError, Reader};

/// Regular creations under one set of current names.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct CreationsRow {
    /// `organizations.name`
    pub organization_name: String,
    /// `templates.name`
    pub template_name: String,
    /// `template_version_presets.name`; empty without a preset
    pub preset_name: String,
    pub creations: i64,
}

impl Reader {
    /// Counts workspaces whose first successful start completed before `before` and was not the
    /// prebuilds user's. Source: the query behind `coderd_workspace_creation_total`. Unlike it,
    /// deleted templates are included, so that the counter never falls.
    pub async fn creations_before(
        &mut self,
        before: DateTime<Utc>,
    ) -> Result<Vec<CreationsRow>, CoderdError> {
        let query = sqlx::query_as(
            "select organizations.name as organization_name, templates.name as template_name, coalesce(preset.name, '') as preset_name,
                     count(*) as creations
                 from (
                     select distinct on (build.workspace_id)
                         build.workspace_id, build.initiator_id, build.template_version_preset_id, job.completed_at
                     from workspace_builds build
                     join provisioner_jobs job on job.id = build.job_id
                     where build.transition = 'start' and job.job_status = 'succeeded'
                     order by build.workspace_id, build.build_number, build.id
                 ) first_start
                 join workspaces on workspaces.id = first_start.workspace_id
                 join templates on templates.id = workspaces.template_id
                 join organizations on organizations.id = workspaces.organization_id
                 left join template_version_presets preset on preset.id = first_start.template_version_preset_id
                 where first_start.completed_at < $1 and first_start.initiator_id <> 'c42fdf75-3097-471c-8c33-fb52454d81c0'
                 group by 1, 2, 3
                 order by 1, 2, 3",
        )
        .bind(before);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// Workspaces with a successful start that completed before `before`, including those of the
    /// prebuilds pool.
    pub async fn workspaces_started_before(
        &mut self,
        before: DateTime<Utc>,
    ) -> Result<Vec<Uuid>, CoderdError> {
        let query = sqlx::query_scalar(
            "select distinct build.workspace_id
                 from workspace_builds build join provisioner_jobs job on job.id = build.job_id
                 where build.transition = 'start' and job.job_status = 'succeeded' and job.completed_at < $1",
        )
        .bind(before);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }
}
