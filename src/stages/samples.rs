//! Plain facts for the stages' tests.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use crate::event::{
    BuildStatus, Event, Fact, InputStage, PREBUILDS_USER, Payload, PrebuildClaimed, PublishMarks,
    Transition, Usage, UsageQuantity, WorkspaceBuildCompleted,
};

use super::Stage;

/// Saved pieces by name.
pub type Saved = BTreeMap<String, Vec<u8>>;

/// All pieces of a state: equal for equal states, bit for bit.
pub fn pieces<S: Stage>(state: &S) -> Saved {
    let all = state.pieces().into_iter();
    all.map(|piece| (piece.to_string(), state.encode(piece).expect("a piece"))).collect()
}

/// Saves the pieces that changed since the last call.
pub fn save<S: Stage>(state: &mut S, saved: &mut Saved) {
    for piece in state.take_changed() {
        match state.encode(piece) {
            Some(content) => saved.insert(piece.to_string(), content),
            None => saved.remove(&piece.to_string()),
        };
    }
}

pub fn load<S: Stage>(saved: &Saved) -> S {
    let mut state = S::default();
    for (name, content) in saved.iter().rev() {
        state.decode(name.parse().expect("a name"), content).expect("readable");
    }
    state
}

pub const DEPLOYMENT: Uuid = Uuid::from_u128(0xd1);
pub const USER: Uuid = Uuid::from_u128(0x05e7);

pub fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a time")
}

/// The instant at which histograms begin.
pub fn introduced_at() -> DateTime<Utc> {
    at("2025-08-01T12:00:00Z")
}

pub fn introduced(deployment: Uuid) -> Fact {
    Fact::Introduced { deployment, introduced_at: introduced_at() }
}

/// A user's regular creation that succeeds at the first attempt, an hour after the introduction, in
/// 42 seconds.
pub fn build() -> WorkspaceBuildCompleted {
    let completed_at = introduced_at() + TimeDelta::hours(1);
    WorkspaceBuildCompleted {
        build_id: Uuid::from_u128(1),
        workspace_id: Uuid::from_u128(2),
        organization_id: Uuid::from_u128(3),
        template_id: Uuid::from_u128(4),
        template_version_id: Uuid::from_u128(5),
        preset_id: Some(Uuid::from_u128(6)),
        owner_id: USER,
        initiator_id: USER,
        transition: Transition::Start,
        reason: "initiator".into(),
        status: BuildStatus::Succeeded,
        build_number: 1,
        stage: None,
        first_build_by_prebuilds_user: false,
        first_build_stage: None,
        first_successful_start: true,
        has_ai_task: None,
        has_external_agent: None,
        daily_cost: 0,
        created_at: completed_at - TimeDelta::seconds(45),
        started_at: Some(completed_at - TimeDelta::seconds(42)),
        completed_at,
        organization_name: "engineering".into(),
        template_name: "docker".into(),
        template_version_name: "v1".into(),
        preset_name: "small".into(),
        workspace_name: "workspace-001".into(),
        owner_name: "user-001".into(),
    }
}

/// The build of a workspace for the pool of prebuilt workspaces.
pub fn pool_build() -> WorkspaceBuildCompleted {
    WorkspaceBuildCompleted {
        owner_id: PREBUILDS_USER,
        initiator_id: PREBUILDS_USER,
        stage: Some(InputStage::Create),
        first_build_by_prebuilds_user: true,
        first_build_stage: None,
        ..build()
    }
}

/// The build with which a user claims that workspace.
pub fn claim_build() -> WorkspaceBuildCompleted {
    WorkspaceBuildCompleted {
        build_number: 2,
        stage: Some(InputStage::Claim),
        first_build_by_prebuilds_user: true,
        first_build_stage: None,
        first_successful_start: false,
        ..build()
    }
}

/// The claim of that build, which took 7 seconds.
pub fn claim() -> PrebuildClaimed {
    let build = claim_build();
    PrebuildClaimed {
        build_id: build.build_id,
        workspace_id: build.workspace_id,
        organization_id: build.organization_id,
        template_id: build.template_id,
        template_version_id: build.template_version_id,
        preset_id: build.preset_id,
        claimed_by: USER,
        initiator_id: USER,
        build_number: 2,
        stage: Some(InputStage::Claim),
        status: BuildStatus::Succeeded,
        created_at: build.created_at,
        started_at: Some(build.completed_at - TimeDelta::seconds(7)),
        completed_at: build.completed_at,
        organization_name: build.organization_name,
        template_name: build.template_name,
        preset_name: build.preset_name,
    }
}

pub fn usage(quantity: UsageQuantity, created_at: DateTime<Utc>) -> Usage {
    Usage { id: "usage-1".into(), quantity, created_at, marks: PublishMarks::default() }
}

pub fn fact(payload: impl Into<Payload>) -> Fact {
    Fact::Event(Event { deployment: DEPLOYMENT, payload: payload.into() })
}

impl From<WorkspaceBuildCompleted> for Payload {
    fn from(build: WorkspaceBuildCompleted) -> Self {
        Payload::Build(Box::new(build))
    }
}

impl From<PrebuildClaimed> for Payload {
    fn from(claim: PrebuildClaimed) -> Self {
        Payload::Claim(Box::new(claim))
    }
}

impl From<Usage> for Payload {
    fn from(usage: Usage) -> Self {
        Payload::Usage(usage)
    }
}
