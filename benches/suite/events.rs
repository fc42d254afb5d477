//! Builds as in a busy deployment: random ids, names of usual length, every transition.

use chrono::{DateTime, TimeDelta, Utc};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tallyline::event::{
    BuildStatus, Event, InputStage, PREBUILDS_USER, Payload, Transition, WorkspaceBuildCompleted,
};
use uuid::Uuid;

pub const DEPLOYMENT: Uuid = Uuid::from_u128(0x5f0c_3a51_77b2_4c0e_9d1f_2a64_8be0_1133);

/// Builds of one workspace: a start, then stops and starts, and a delete.
const BUILDS_OF_A_WORKSPACE: u32 = 5;

/// The completed build of that number; the same number gives the same build.
pub fn event(number: u32) -> Event {
    let workspace = number / BUILDS_OF_A_WORKSPACE;
    let build_number = number % BUILDS_OF_A_WORKSPACE + 1;
    let mut of_workspace = chance(1, workspace);
    let mut of_build = chance(2, number);
    let (organization, template) =
        (of_workspace.random_range(0..3), of_workspace.random_range(0..12));
    let owner = of_workspace.random_range(0..2_000);
    let preset = of_workspace.random_bool(0.5).then(|| of_workspace.random_range(0..30));
    let prebuilt = of_workspace.random_bool(0.2);
    let transition = match build_number {
        BUILDS_OF_A_WORKSPACE => Transition::Delete,
        odd if odd % 2 == 1 => Transition::Start,
        _ => Transition::Stop,
    };
    let by_pool = prebuilt && build_number == 1;
    let failed = build_number > 1 && of_build.random_bool(0.03);
    let completed_at = began()
        + TimeDelta::milliseconds(i64::from(number) * 1_500 + of_build.random_range(0..1_000));
    let ran = TimeDelta::milliseconds(of_build.random_range(8_000..240_000));
    let build = WorkspaceBuildCompleted {
        build_id: random_id(&mut of_build),
        workspace_id: random_id(&mut of_workspace),
        organization_id: id(3, organization),
        template_id: id(4, template),
        template_version_id: id(5, template * 100 + of_build.random_range(0..4)),
        preset_id: preset.map(|preset| id(6, preset)),
        owner_id: if by_pool { PREBUILDS_USER } else { id(7, owner) },
        initiator_id: if by_pool { PREBUILDS_USER } else { id(7, owner) },
        transition,
        reason: if build_number == 2 { "autostop" } else { "initiator" }.to_owned(),
        status: if failed { BuildStatus::Failed } else { BuildStatus::Succeeded },
        build_number: i32::try_from(build_number).unwrap_or_default(),
        stage: by_pool.then_some(InputStage::Create),
        first_build_by_prebuilds_user: prebuilt,
        first_build_stage: None,
        first_successful_start: build_number == 1,
        has_ai_task: Some(of_build.random_bool(0.1)),
        has_external_agent: Some(false),
        daily_cost: 10,
        created_at: completed_at
            - ran
            - TimeDelta::microseconds(of_build.random_range(100_000..5_000_000)),
        started_at: Some(completed_at - ran),
        completed_at,
        organization_name: format!("organization-{organization}"),
        template_name: format!("kubernetes-devcontainer-{template}"),
        template_version_name: format!("release-{template}.{}", of_build.random_range(0..4)),
        preset_name: preset.map(|preset| format!("large-{preset}")).unwrap_or_default(),
        workspace_name: format!("workspace-{workspace}"),
        owner_name: if by_pool { "prebuilds".to_owned() } else { format!("user-{owner:03}") },
    };
    Event { deployment: DEPLOYMENT, payload: Payload::Build(Box::new(build)) }
}

fn began() -> DateTime<Utc> {
    DateTime::from_timestamp(1_735_689_600, 0).unwrap_or_default()
}

fn chance(kind: u64, number: u32) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(kind << 32 | u64::from(number))
}

fn random_id(chance: &mut ChaCha8Rng) -> Uuid {
    uuid::Builder::from_random_bytes(chance.random()).into_uuid()
}

fn id(kind: u64, number: u32) -> Uuid {
    random_id(&mut chance(kind, number))
}
