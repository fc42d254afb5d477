//! The one event type that crosses the log, its wire form and its digest.
//!
//! Events are CloudEvents 1.0. `source` is `/coder/<deployment id>`; source and id identify an event. An event type never changes:
//! a change adds a type with a new suffix, and old versions remain readable.

mod build;
mod cause;
mod claim;
mod digest;
mod fact;
mod fields;
mod message;
mod parse;
mod signature;
#[cfg(test)]
mod tests;
mod topic;
mod traces;
mod usage;

pub use build::{BuildKind, BuildStatus, InputStage, Transition, WorkspaceBuildCompleted, kind};
pub use cause::RejectCause;
pub use claim::PrebuildClaimed;
pub use digest::Digest;
pub use fact::Fact;
pub use fields::{MAX_ID_BYTES, MAX_TEXT_BYTES, YEARS};
pub use message::{KEPT_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, Message, Oversized, UNREADABLE};
pub use parse::{ParseError, STRUCTURED, parse, parse_in};
pub use signature::{LEAST_KEY_BYTES, SIGNATURE, SignatureError, Signatures, Signer};
pub use topic::{Topic, TopicPartition};
pub use traces::Traces;
pub use usage::{PublishMarks, Usage, UsageQuantity, UsageType};

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// coderd's system user, which owns unclaimed prebuilt workspaces and starts the pool's builds. Source: Coder's early migrations.
pub const PREBUILDS_USER: Uuid = Uuid::from_u128(0xc42f_df75_3097_471c_8c33_fb52_454d_81c0);

/// One accepted event of one Coder deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The deployment id in `source`, `/coder/<deployment id>`.
    pub deployment: Uuid,
    pub payload: Payload,
}

/// Whether a type is one of the two build events.
#[must_use]
pub fn is_build_type(event_type: &str) -> bool {
    event_type == build::TYPE || event_type == claim::TYPE
}

/// The build in the id of a build event or claim event. None: the id is not of one.
#[must_use]
pub fn build_of(event_id: &str) -> Option<Uuid> {
    let id = event_id.strip_prefix(build::ID_PREFIX).or_else(|| event_id.strip_prefix(claim::ID_PREFIX))?;
    Uuid::try_parse(id).ok()
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
            Payload::Claim(claim) => format!("{}{}", claim::ID_PREFIX, claim.build_id),
            Payload::Usage(usage) => usage.id.clone(),
        }
    }

    #[must_use]
    pub fn event_type(&self) -> &'static str {
        match &self.payload {
            Payload::Build(_) => build::TYPE,
            Payload::Claim(_) => claim::TYPE,
            Payload::Usage(usage) => usage.quantity.usage_type().as_str(),
        }
    }

    /// When the event happened, by the source's clock: completion of the build, or `created_at` of the usage.
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

    /// The record key: the workspace id, or deployment id and event id for usage. Records of one key are in one partition, hence in order.
    #[must_use]
    pub fn key(&self) -> String {
        match &self.payload {
            Payload::Build(build) => build.workspace_id.to_string(),
            Payload::Claim(claim) => claim.workspace_id.to_string(),
            Payload::Usage(usage) => format!("{}:{}", self.deployment, usage.id),
        }
    }

    /// The digest of the fields that must be equal in all events of one id.
    #[must_use]
    pub fn digest(&self) -> Digest {
        digest::of(self)
    }
}
