//! The two events of a completed build: `workspace_build_completed_v1` and `prebuild_claimed_v1`.
//! One rule classifies builds.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::cause::ParseError;
use super::fields::{Fields, number, time, uuid};
use crate::words::words;

/// The CloudEvents type of a build.
pub(super) const TYPE: &str = "workspace_build_completed_v1";
/// The CloudEvents type of a prebuild claim.
pub(super) const CLAIM_TYPE: &str = "prebuild_claimed_v1";
/// Prefix of a build's event id, before the build id.
pub(super) const ID_PREFIX: &str = "workspace_build_completed:";
/// Prefix of a prebuild claim's event id, before the id of the claim's build.
pub(super) const CLAIM_ID_PREFIX: &str = "prebuild_claimed:";

/// coderd's system user, which owns unclaimed prebuilt workspaces and starts the pool's builds.
/// Source: Coder's early migrations.
pub const PREBUILDS_USER: Uuid = Uuid::from_u128(0xc42f_df75_3097_471c_8c33_fb52_454d_81c0);

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

/// Declares the two events. Each has the shared fields, so that every field is listed once.
macro_rules! build_events {
    (
        shared { $($(#[$attribute:meta])* $field:ident: $type:ty,)* }
        build { $($build:tt)* }
        claim { $($claim:tt)* }
    ) => {
        /// One completed build, of any transition and status. All ids are coderd's. Names are
        /// labels and keep the value of the first collection. Its JSON is the event's data.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, sqlx::FromRow)]
        #[serde(deny_unknown_fields)]
        pub struct WorkspaceBuildCompleted {
            $($(#[$attribute])* pub $field: $type,)*
            $($build)*
        }

        /// One completed prebuild claim, of any status. Its build is also a
        /// [`WorkspaceBuildCompleted`]; claim metrics use only this event. Its JSON is the event's
        /// data.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, sqlx::FromRow)]
        #[serde(deny_unknown_fields)]
        pub struct PrebuildClaimed {
            $($(#[$attribute])* pub $field: $type,)*
            $($claim)*
        }

        impl PrebuildClaimed {
            /// The claim of this build, which [`kind`] classifies as a claim.
            #[must_use]
            pub fn of(build: &WorkspaceBuildCompleted) -> Self {
                PrebuildClaimed {
                    claimed_by: build.owner_id,
                    $($field: Clone::clone(&build.$field),)*
                }
            }
        }
    };
}

build_events! {
    shared {
        /// `workspace_builds.id`
        #[serde(deserialize_with = "uuid")]
        build_id: Uuid,
        /// `workspace_builds.workspace_id`
        #[serde(deserialize_with = "uuid")]
        workspace_id: Uuid,
        /// `workspaces.organization_id`
        #[serde(deserialize_with = "uuid")]
        organization_id: Uuid,
        /// `workspaces.template_id`
        #[serde(deserialize_with = "uuid")]
        template_id: Uuid,
        /// `workspace_builds.template_version_id`
        #[serde(deserialize_with = "uuid")]
        template_version_id: Uuid,
        /// `workspace_builds.template_version_preset_id`; coderd empties it when the preset is
        /// removed
        #[serde(default, deserialize_with = "uuid")]
        preset_id: Option<Uuid>,
        /// `workspace_builds.initiator_id`. The initiator of a prebuild claim is the claiming user
        /// or the prebuilds user, depending on coderd's version.
        #[serde(deserialize_with = "uuid")]
        initiator_id: Uuid,
        /// `workspace_builds.build_number`, from 1
        #[serde(deserialize_with = "number::<_, 1>")]
        build_number: i32,
        /// The job input's stage; absent in a claim that the fallback classified
        stage: Option<InputStage>,
        /// The result of the job
        status: BuildStatus,
        /// `provisioner_jobs.created_at`
        #[serde(deserialize_with = "time")]
        created_at: DateTime<Utc>,
        /// `provisioner_jobs.started_at`; absent when the job never ran
        #[serde(default, deserialize_with = "time")]
        started_at: Option<DateTime<Utc>>,
        /// `provisioner_jobs.completed_at`
        #[serde(deserialize_with = "time")]
        completed_at: DateTime<Utc>,
        /// `organizations.name`
        organization_name: String,
        /// `templates.name`
        template_name: String,
        /// `template_version_presets.name`, empty without a preset
        preset_name: String,
    }
    build {
        /// `workspaces.owner_id` when first collected; a prebuild claim changes it
        #[serde(deserialize_with = "uuid")]
        pub owner_id: Uuid,
        /// `workspace_builds.transition`
        pub transition: Transition,
        /// `workspace_builds.reason`, as coderd's text, because values are added to and removed
        /// from the enum
        pub reason: String,
        /// Whether the workspace's build 1 was initiated by the prebuilds user
        pub first_build_by_prebuilds_user: bool,
        /// The stage of the workspace's build 1. It is an extension attribute, so that earlier
        /// versions accept the event, and is not part of the digest.
        #[serde(skip)]
        pub first_build_stage: Option<InputStage>,
        /// Whether this is a succeeded start and coderd has no succeeded start of this workspace
        /// with a lower number
        pub first_successful_start: bool,
        /// `workspace_builds.has_ai_task`, if the schema has the column
        pub has_ai_task: Option<bool>,
        /// `workspace_builds.has_external_agent`
        pub has_external_agent: Option<bool>,
        /// `workspace_builds.daily_cost`
        #[serde(deserialize_with = "number::<_, { i32::MIN }>")]
        pub daily_cost: i32,
        /// `template_versions.name`
        pub template_version_name: String,
        /// `workspaces.name`
        pub workspace_name: String,
        /// `users.username` of the owner
        pub owner_name: String,
    }
    claim {
        /// The claiming user: the workspace's owner after the claim, which changes the owner before
        /// the build runs
        #[serde(deserialize_with = "uuid")]
        pub claimed_by: Uuid,
    }
}

impl WorkspaceBuildCompleted {
    /// Reads a build from its data. The stage of build 1 comes from the attributes.
    pub(super) fn read(
        data: Fields<'_>,
        first_build_stage: Option<InputStage>,
    ) -> Result<Self, ParseError> {
        let build = WorkspaceBuildCompleted { first_build_stage, ..data.read()? };
        let succeeded_start =
            build.transition == Transition::Start && build.status == BuildStatus::Succeeded;
        if build.first_successful_start && !succeeded_start {
            let problem = "is true, but the build is not a succeeded start";
            return Err(ParseError::field("first_successful_start", problem));
        }
        Ok(build)
    }

    /// `completed_at − started_at`. None if the job never ran, or if the job reaper failed it and
    /// set both to the same time. Negative if two clocks that differ wrote the two times.
    #[must_use]
    pub fn duration(&self) -> Option<TimeDelta> {
        duration(self.status, self.started_at, self.completed_at)
    }
}

impl PrebuildClaimed {
    /// See [`WorkspaceBuildCompleted::duration`].
    #[must_use]
    pub fn duration(&self) -> Option<TimeDelta> {
        duration(self.status, self.started_at, self.completed_at)
    }
}

fn duration(
    status: BuildStatus,
    started_at: Option<DateTime<Utc>>,
    completed_at: DateTime<Utc>,
) -> Option<TimeDelta> {
    let reaped = status == BuildStatus::Failed && started_at == Some(completed_at);
    let started_at = started_at.filter(|_| !reaped);
    started_at.map(|started_at| completed_at.signed_duration_since(started_at))
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

/// Classifies a completed build. Source: Coder's flags IsPrebuild, IsClaim and IsFirstBuild with
/// their priority, and the fallback by row for inputs without a stage. The initiator of a claim
/// depends on coderd's version and never decides. If the pool's build 1 has a stage, a claim has
/// one too; build 2 without a stage is an administrator's start or retry.
#[must_use]
pub fn kind(build: &WorkspaceBuildCompleted) -> BuildKind {
    match (build.transition, build.stage, build.build_number) {
        (Transition::Start, Some(InputStage::Create), _) => BuildKind::PrebuildCreation,
        (Transition::Start, Some(InputStage::Claim), _) => BuildKind::PrebuildClaim,
        (Transition::Start, None, 1) if build.initiator_id == PREBUILDS_USER => {
            BuildKind::PrebuildCreation
        }
        (Transition::Start, None, 2)
            if build.first_build_by_prebuilds_user && build.first_build_stage.is_none() =>
        {
            BuildKind::PrebuildClaim
        }
        (Transition::Start, None, 1) => BuildKind::RegularCreation,
        _ => BuildKind::Other,
    }
}

/// Whether a type is one of the two build events.
#[must_use]
pub fn is_build_type(event_type: &str) -> bool {
    event_type == TYPE || event_type == CLAIM_TYPE
}

/// The ids of a build's event and of its claim's event.
#[must_use]
pub fn ids_of_build(build_id: Uuid) -> [String; 2] {
    [ID_PREFIX, CLAIM_ID_PREFIX].map(|prefix| format!("{prefix}{build_id}"))
}

/// The build in the id of a build event or claim event. None: the id is not of one.
#[must_use]
pub fn build_of(event_id: &str) -> Option<Uuid> {
    let id = event_id.strip_prefix(ID_PREFIX).or_else(|| event_id.strip_prefix(CLAIM_ID_PREFIX))?;
    Uuid::try_parse(id).ok()
}
