//! One event: its deployment and its payload, with the attributes that follow from them, and its
//! digest: SHA-256 over the fields that coderd never rewrites, in a pinned, versioned binary form.

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::build::{self, InputStage, PrebuildClaimed, WorkspaceBuildCompleted};
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

    /// The digest of the fields that must be equal in all events of one id.
    #[must_use]
    pub fn digest(&self) -> Digest {
        digest_of(self)
    }
}

/// 32 bytes. Two events of one id have equal digests exactly if their covered fields are equal.
pub type Digest = [u8; 32];

/// The form: a tag with its version, then each field; an optional field has a presence byte before
/// it. Text is length and bytes, and ids are 16 bytes. Numbers and times (in microseconds since the
/// Unix epoch) are 8 bytes big endian. A test pins it; a change needs a new tag.
fn digest_of(event: &Event) -> Digest {
    let mut form = Form::new("tallyline.digest.v1");
    match &event.payload {
        Payload::Build(build) => {
            form.text(event.event_type())
                .id(build.build_id)
                .id(build.workspace_id)
                .id(build.organization_id)
                .id(build.template_version_id);
            form.id(build.initiator_id)
                .number(i64::from(build.build_number))
                .text(build.transition.as_str());
            form.optional(build.stage, |form, stage| form.text(InputStage::as_str(stage)));
            form.time(build.created_at)
                .optional(build.started_at, Form::time)
                .time(build.completed_at)
                .text(build.status.as_str());
        }
        Payload::Claim(claim) => {
            form.text(event.event_type())
                .id(claim.build_id)
                .id(claim.workspace_id)
                .id(claim.organization_id)
                .id(claim.template_version_id);
            form.id(claim.initiator_id).number(i64::from(claim.build_number));
            form.optional(claim.stage, |form, stage| form.text(InputStage::as_str(stage)));
            form.time(claim.created_at)
                .optional(claim.started_at, Form::time)
                .time(claim.completed_at)
                .text(claim.status.as_str());
        }
        Payload::Usage(usage) => {
            form.text(event.event_type())
                .text(&usage.id)
                .bytes(&usage.quantity.number().to_be_bytes())
                .time(usage.created_at);
        }
    }
    form.finish()
}

/// A binary form whose fields cannot run into each other, and its SHA-256.
pub(crate) struct Form(Sha256);

impl Form {
    pub(crate) fn new(tag: &str) -> Self {
        let mut form = Form(Sha256::new());
        form.text(tag);
        form
    }
    /// Bytes of a length that is fixed for the field.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(&(text.len() as u64).to_be_bytes()).bytes(text.as_bytes())
    }
    pub(crate) fn id(&mut self, id: Uuid) -> &mut Self {
        self.bytes(id.as_bytes())
    }
    pub(crate) fn flag(&mut self, flag: bool) -> &mut Self {
        self.bytes(&[flag.into()])
    }
    pub(crate) fn number(&mut self, number: i64) -> &mut Self {
        self.bytes(&number.to_be_bytes())
    }
    pub(crate) fn time(&mut self, at: DateTime<Utc>) -> &mut Self {
        self.number(at.timestamp_micros())
    }
    pub(crate) fn optional<T>(
        &mut self,
        value: Option<T>,
        write: impl FnOnce(&mut Self, T) -> &mut Self,
    ) -> &mut Self {
        match value {
            None => self.bytes(&[0]),
            Some(value) => write(self.bytes(&[1]), value),
        }
    }
    pub(crate) fn finish(self) -> Digest {
        self.0.finalize().into()
    }
}
