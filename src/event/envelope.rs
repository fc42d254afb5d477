//! One event: its deployment and its payload, with the attributes that follow from them.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::build::{self, PrebuildClaimed, WorkspaceBuildCompleted};
use super::topic::Topic;
use super::usage::Usage;

/// One accepted event of one Coder deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The deployment id in `source`, `/coder/<deployment id>`.
    pub deployment: Uuid,
    pub payload: Payload,
}

/// The payload of an event, by type.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// `workspace_build_completed_v1`
    Build(Box<WorkspaceBuildCompleted>),
    /// `prebuild_claimed_v1`
    Claim(Box<PrebuildClaimed>),
    /// `dc_managed_agents_v1`, `hb_ai_seats_v1`, `hb_agent_runtime_v1`
    Usage(Usage),
}

impl Event {
    /// The CloudEvents id: the source's own key, without a version.
    #[must_use]
    pub fn id(&self) -> String {
        match &self.payload {
            Payload::Build(build) => format!("{}{}", build::ID_PREFIX, build.build_id),
            Payload::Claim(claim) => format!("{}{}", build::CLAIM_ID_PREFIX, claim.build_id),
            Payload::Usage(usage) => usage.id.clone(),
        }
    }

    #[must_use]
    pub fn event_type(&self) -> &'static str {
        match &self.payload {
            Payload::Build(_) => build::TYPE,
            Payload::Claim(_) => build::CLAIM_TYPE,
            Payload::Usage(usage) => usage.quantity.usage_type().as_str(),
        }
    }

    /// When the event happened, by the source's clock: completion of the build, or `created_at` of
    /// the usage.
    #[must_use]
    pub fn time(&self) -> DateTime<Utc> {
        match &self.payload {
            Payload::Build(build) => build.completed_at,
            Payload::Claim(claim) => claim.completed_at,
            Payload::Usage(usage) => usage.created_at,
        }
    }

    /// The topic of the event.
    #[must_use]
    pub fn topic(&self) -> Topic {
        match &self.payload {
            Payload::Build(_) => Topic::WorkspaceBuilds,
            Payload::Claim(_) => Topic::PrebuildClaims,
            Payload::Usage(_) => Topic::AgentUsage,
        }
    }

    /// The record key: the workspace id, or deployment id and event id for usage. Records of one
    /// key are in one partition, hence in order.
    #[must_use]
    pub fn key(&self) -> String {
        match &self.payload {
            Payload::Build(build) => build.workspace_id.to_string(),
            Payload::Claim(claim) => claim.workspace_id.to_string(),
            Payload::Usage(usage) => format!("{}:{}", self.deployment, usage.id),
        }
    }
}
