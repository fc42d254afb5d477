//! `prebuild_claimed_v1`: the completed build by which a user claims a prebuilt workspace.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::ParseError;
use super::build::{self, BuildStatus, InputStage};
use super::fields::Fields;

/// The CloudEvents type.
pub(super) const TYPE: &str = "prebuild_claimed_v1";
/// Prefix of event ids, before the id of the claim's build.
pub(super) const ID_PREFIX: &str = "prebuild_claimed:";

/// One completed prebuild claim, of any status. Its build is also a [`super::WorkspaceBuildCompleted`]; claim metrics use only this event.
/// Its JSON is the event's data.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow)]
pub struct PrebuildClaimed {
    /// `workspace_builds.id` of the claim's build
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
    /// The claiming user: the workspace's owner after the claim, which changes the owner before the build runs
    pub claimed_by: Uuid,
    /// `workspace_builds.initiator_id`: the claiming user or the prebuilds user, depending on coderd's version
    pub initiator_id: Uuid,
    /// `workspace_builds.build_number`
    pub build_number: i32,
    /// The job input's stage; absent if the fallback classified the claim
    pub stage: Option<InputStage>,
    /// The result of the job
    pub status: BuildStatus,
    /// `provisioner_jobs.created_at`
    pub created_at: DateTime<Utc>,
    /// `provisioner_jobs.started_at`
    pub started_at: Option<DateTime<Utc>>,
    /// `provisioner_jobs.completed_at`
    pub completed_at: DateTime<Utc>,
    /// `organizations.name`
    pub organization_name: String,
    /// `templates.name`
    pub template_name: String,
    /// `template_version_presets.name`, empty without a preset
    pub preset_name: String,
}

impl PrebuildClaimed {
    /// See [`super::WorkspaceBuildCompleted::duration`].
    #[must_use]
    pub fn duration(&self) -> Option<TimeDelta> {
        build::duration(self.status, self.started_at, self.completed_at)
    }
}

pub(super) fn from_data(mut data: Fields<'_>) -> Result<PrebuildClaimed, ParseError> {
    let claim = PrebuildClaimed {
        build_id: data.uuid("build_id")?,
        workspace_id: data.uuid("workspace_id")?,
        organization_id: data.uuid("organization_id")?,
        template_id: data.uuid("template_id")?,
        template_version_id: data.uuid("template_version_id")?,
        preset_id: data.optional_uuid("preset_id")?,
        claimed_by: data.uuid("claimed_by")?,
        initiator_id: data.uuid("initiator_id")?,
        build_number: data.small_integer("build_number", 1)?,
        stage: data.optional_word("stage")?,
        status: data.word("status")?,
        created_at: data.time("created_at")?,
        started_at: data.optional_time("started_at")?,
        completed_at: data.time("completed_at")?,
        organization_name: data.text("organization_name")?,
        template_name: data.text("template_name")?,
        preset_name: data.text("preset_name")?,
    };
    data.finish()?;
    Ok(claim)
}
