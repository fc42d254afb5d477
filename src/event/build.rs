//! `workspace_build_completed_v1`: one completed workspace build, and the one rule that classifies it.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::fields::Fields;
use super::{PREBUILDS_USER, ParseError};
use crate::words::words;

/// The CloudEvents type.
pub(super) const TYPE: &str = "workspace_build_completed_v1";
/// Prefix of event ids, before the build id.
pub(super) const ID_PREFIX: &str = "workspace_build_completed:";

words! {
    /// coderd's enum `workspace_transition`.
    Transition {
        Start = "start",
        Stop = "stop",
        Delete = "delete",
    }
}

words! {
    /// coderd's generated column `job_status` of a completed job.
    BuildStatus {
        /// The job has no error and was not canceled.
        Succeeded = "succeeded",
        /// The job has a non-empty error. It takes precedence over a cancellation.
        Failed = "failed",
        /// The job was canceled and has no error.
        Canceled = "canceled",
    }
}

words! {
    /// The job input's `prebuilt_workspace_stage`: 1 or 2. A missing stage and 0 are not a stage.
    InputStage {
        /// Stage 1: the pool creates a prebuilt workspace.
        Create = "create",
        /// Stage 2: a user claims a prebuilt workspace.
        Claim = "claim",
    }
}

/// One completed build, of any transition and status. All ids are coderd's. Names are labels and keep the value of the first
/// collection. Its JSON is the event's data.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow)]
pub struct WorkspaceBuildCompleted {
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
    /// `workspace_builds.template_version_preset_id`; coderd empties it when the preset is removed
    pub preset_id: Option<Uuid>,
    /// `workspaces.owner_id` when first collected; a prebuild claim changes it
    pub owner_id: Uuid,
    /// `workspace_builds.initiator_id`
    pub initiator_id: Uuid,
    /// `workspace_builds.transition`
    pub transition: Transition,
    /// `workspace_builds.reason`, as coderd's text, because values are added to and removed from the enum
    pub reason: String,
    /// The result of the job
    pub status: BuildStatus,
    /// `workspace_builds.build_number`, from 1
    pub build_number: i32,
    /// The job input's stage
    pub stage: Option<InputStage>,
    /// Whether the workspace's build 1 was initiated by the prebuilds user
    pub first_build_by_prebuilds_user: bool,
    /// The stage of the workspace's build 1. It is an extension attribute, so that earlier versions accept the event, and
    /// is not part of the digest.
    #[serde(skip)]
    pub first_build_stage: Option<InputStage>,
    /// Whether this is a succeeded start and coderd has no succeeded start of this workspace with a lower number
    pub first_successful_start: bool,
    /// `workspace_builds.has_ai_task`, if the schema has the column
    pub has_ai_task: Option<bool>,
    /// `workspace_builds.has_external_agent`
    pub has_external_agent: Option<bool>,
    /// `workspace_builds.daily_cost`
    pub daily_cost: i32,
    /// `provisioner_jobs.created_at`
    pub created_at: DateTime<Utc>,
    /// `provisioner_jobs.started_at`; absent when the job never ran
    pub started_at: Option<DateTime<Utc>>,
    /// `provisioner_jobs.completed_at`
    pub completed_at: DateTime<Utc>,
    /// `organizations.name`
    pub organization_name: String,
    /// `templates.name`
    pub template_name: String,
    /// `template_versions.name`
    pub template_version_name: String,
    /// `template_version_presets.name`, empty without a preset
    pub preset_name: String,
    /// `workspaces.name`
    pub workspace_name: String,
    /// `users.username` of the owner
    pub owner_name: String,
}

impl WorkspaceBuildCompleted {
    /// `completed_at − started_at`. None if the job never ran, or if the job reaper failed it and set both to the same time. Negative
    /// if two clocks that differ wrote the two times.
    #[must_use]
    pub fn duration(&self) -> Option<TimeDelta> {
        duration(self.status, self.started_at, self.completed_at)
    }
}

/// See [`WorkspaceBuildCompleted::duration`].
pub(super) fn duration(status: BuildStatus, started_at: Option<DateTime<Utc>>, completed_at: DateTime<Utc>) -> Option<TimeDelta> {
    let reaped = status == BuildStatus::Failed && started_at == Some(completed_at);
    started_at.filter(|_| !reaped).map(|started_at| completed_at.signed_duration_since(started_at))
}

/// The kind of a build, for timing metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BuildKind {
    /// A user creates a workspace: its first build.
    RegularCreation,
    /// The pool creates a prebuilt workspace.
    PrebuildCreation,
    /// A user claims a prebuilt workspace.
    PrebuildClaim,
    /// Any other build: restarts, stops, deletes.
    Other,
}

/// Classifies a completed build. Source: Coder's flags IsPrebuild, IsClaim and IsFirstBuild with their priority, and the fallback by row
/// for inputs without a stage. The initiator of a claim depends on coderd's version and never decides. If the pool's build 1 has a
/// stage, a claim has one too; build 2 without a stage is an administrator's start or retry.
#[must_use]
pub fn kind(build: &WorkspaceBuildCompleted) -> BuildKind {
    match (build.transition, build.stage, build.build_number) {
        (Transition::Start, Some(InputStage::Create), _) => BuildKind::PrebuildCreation,
        (Transition::Start, Some(InputStage::Claim), _) => BuildKind::PrebuildClaim,
        (Transition::Start, None, 1) if build.initiator_id == PREBUILDS_USER => BuildKind::PrebuildCreation,
        (Transition::Start, None, 2) if build.first_build_by_prebuilds_user && build.first_build_stage.is_none() => {
            BuildKind::PrebuildClaim
        }
        (Transition::Start, None, 1) => BuildKind::RegularCreation,
        _ => BuildKind::Other,
    }
}

/// Reads a build from these fields. The stage of build 1 comes from the attributes.
pub(super) fn from_data(mut data: Fields<'_>, first_build_stage: Option<InputStage>) -> Result<WorkspaceBuildCompleted, ParseError> {
    let build = WorkspaceBuildCompleted {
        build_id: data.uuid("build_id")?,
        workspace_id: data.uuid("workspace_id")?,
        organization_id: data.uuid("organization_id")?,
        template_id: data.uuid("template_id")?,
        template_version_id: data.uuid("template_version_id")?,
        preset_id: data.optional_uuid("preset_id")?,
        owner_id: data.uuid("owner_id")?,
        initiator_id: data.uuid("initiator_id")?,
        transition: data.word("transition")?,
        reason: data.text("reason")?,
        status: data.word("status")?,
        build_number: data.small_integer("build_number", 1)?,
        stage: data.optional_word("stage")?,
        first_build_by_prebuilds_user: data.flag("first_build_by_prebuilds_user")?,
        first_build_stage,
        first_successful_start: data.flag("first_successful_start")?,
        has_ai_task: data.optional_flag("has_ai_task")?,
        has_external_agent: data.optional_flag("has_external_agent")?,
        daily_cost: data.small_integer("daily_cost", i32::MIN)?,
        created_at: data.time("created_at")?,
        started_at: data.optional_time("started_at")?,
        completed_at: data.time("completed_at")?,
        organization_name: data.text("organization_name")?,
        template_name: data.text("template_name")?,
        template_version_name: data.text("template_version_name")?,
        preset_name: data.text("preset_name")?,
        workspace_name: data.text("workspace_name")?,
        owner_name: data.text("owner_name")?,
    };
    data.finish()?;
    let succeeded_start = build.transition == Transition::Start && build.status == BuildStatus::Succeeded;
    if build.first_successful_start && !succeeded_start {
        return Err(ParseError::field("first_successful_start", "is true for a build that is no succeeded start"));
    }
    Ok(build)
}
