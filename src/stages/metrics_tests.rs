//! Tests of coderd's creation and claim metrics with hand-computed values, and of the fold's
//! guarantees.

use chrono::TimeDelta;
use proptest::prelude::*;

use super::*;
use crate::event::{
    BuildStatus, Event, Fact, InputStage, PREBUILDS_USER, PrebuildClaimed, Transition,
    WorkspaceBuildCompleted,
};
use crate::stages::pieces::{Part, Piece};
use crate::stages::samples::{
    DEPLOYMENT, at, build, claim, claim_build, fact, introduced, introduced_at, pool_build, usage,
};
use crate::stages::samples::{Saved, load, pieces, save};
use crate::stages::{LedgerFault, Stage as _};

fn fold(facts: &[Fact]) -> MetricsState {
    let mut state = MetricsState::default();
    for fact in facts {
        state.apply(fact).unwrap();
    }
    state
}

/// The metrics of the only deployment after its introduction and these facts.
fn after(facts: impl IntoIterator<Item = Fact>) -> DeploymentMetrics {
    let facts: Vec<Fact> = std::iter::once(introduced(DEPLOYMENT)).chain(facts).collect();
    fold(&facts).deployment(DEPLOYMENT).unwrap().clone()
}

/// All series as lines: `creations o/t/p N`, `creation o/t/p/type N SUMs`, `claim o/t/p N SUMs`,
/// `negative o N`.
fn lines(metrics: &DeploymentMetrics) -> Vec<String> {
    let seconds = |tally: &Tally| format!("{} {}s", tally.buckets.count, tally.sum_seconds());
    let creations = metrics
        .creations
        .iter()
        .map(|(labels, counter)| format!("creations {} {}", labels.join("/"), counter.value));
    let creation = metrics
        .creation_seconds
        .iter()
        .map(|(labels, tally)| format!("creation {} {}", labels.join("/"), seconds(tally)));
    let claims = metrics
        .claim_seconds
        .iter()
        .map(|(labels, tally)| format!("claim {} {}", labels.join("/"), seconds(tally)));
    let negative = metrics
        .negative_durations
        .iter()
        .map(|(labels, counter)| format!("negative {} {}", labels[0], counter.value));
    creations.chain(creation).chain(claims).chain(negative).collect()
}

#[track_caller]
fn gives<const N: usize>(facts: impl IntoIterator<Item = Fact>, expected: [&str; N]) {
    assert_eq!(lines(&after(facts)), expected);
}

const CREATED: &str = "creations engineering/docker/small 1";

#[test]
fn a_first_build_that_succeeds_is_counted_and_timed() {
    gives([fact(build())], [CREATED, "creation engineering/docker/small/regular 1 42s"]);
}

#[test]
fn a_first_build_that_fails_and_a_second_that_succeeds_is_one_creation_with_the_preset_of_the_second_and_is_not_timed()
 {
    let failed = WorkspaceBuildCompleted {
        status: BuildStatus::Failed,
        first_successful_start: false,
        ..build()
    };
    let second =
        WorkspaceBuildCompleted { build_number: 2, preset_name: "large".into(), ..build() };
    gives([fact(failed), fact(second)], ["creations engineering/docker/large 1"]);
}

#[test]
fn a_prebuild_creation_is_timed_and_not_counted_as_a_regular_creation() {
    gives([fact(pool_build())], ["creation engineering/docker/small/prebuild 1 42s"]);
    let without_stage = WorkspaceBuildCompleted { stage: None, ..pool_build() };
    gives([fact(without_stage)], ["creation engineering/docker/small/prebuild 1 42s"]);
}

#[test]
fn a_claim_by_stage_is_timed_from_its_claim_event_only() {
    gives([fact(claim_build())], []);
    gives([fact(claim_build()), fact(claim())], ["claim engineering/docker/small 1 7s"]);
}

#[test]
fn a_claim_by_fallback_is_timed_from_its_claim_event_only() {
    let build = WorkspaceBuildCompleted { stage: None, ..claim_build() };
    let claim = PrebuildClaimed { stage: None, initiator_id: PREBUILDS_USER, ..claim() };
    gives([fact(build), fact(claim)], ["claim engineering/docker/small 1 7s"]);
}

#[test]
fn a_claim_that_failed_is_not_timed() {
    for status in [BuildStatus::Failed, BuildStatus::Canceled] {
        gives([fact(PrebuildClaimed { status, ..claim() })], []);
    }
}

#[test]
fn restarts_stops_and_deletes_add_nothing() {
    let later = |transition| WorkspaceBuildCompleted {
        transition,
        build_number: 3,
        first_successful_start: false,
        ..build()
    };
    gives(
        [Transition::Start, Transition::Stop, Transition::Delete]
            .map(|transition| fact(later(transition))),
        [],
    );
}

#[test]
fn a_first_build_without_success_adds_nothing() {
    for status in [BuildStatus::Failed, BuildStatus::Canceled] {
        gives(
            [fact(WorkspaceBuildCompleted { status, first_successful_start: false, ..build() })],
            [],
        );
    }
}

#[test]
fn a_build_without_a_duration_is_counted_and_never_observed_as_0() {
    gives([fact(WorkspaceBuildCompleted { started_at: None, ..build() })], [CREATED]);
    gives([fact(PrebuildClaimed { started_at: None, ..claim() })], []);
}

#[test]
fn a_success_that_ends_as_it_starts_is_observed_as_0_and_not_counted_as_skew() {
    let started_at = Some(build().completed_at);
    gives(
        [
            fact(WorkspaceBuildCompleted { started_at, ..build() }),
            fact(PrebuildClaimed { started_at, ..claim() }),
        ],
        [
            CREATED,
            "creation engineering/docker/small/regular 1 0s",
            "claim engineering/docker/small 1 0s",
        ],
    );
}

#[test]
fn a_negative_duration_is_observed_as_0_and_counted_as_skew() {
    let started_at = Some(build().completed_at + TimeDelta::microseconds(1));
    gives(
        [
            fact(WorkspaceBuildCompleted { started_at, ..build() }),
            fact(PrebuildClaimed { started_at, ..claim() }),
        ],
        [
            CREATED,
            "creation engineering/docker/small/regular 1 0s",
            "claim engineering/docker/small 1 0s",
            "negative engineering 2",
        ],
    );
}

#[test]
fn counters_cover_all_time_and_histograms_what_completed_at_or_after_the_introduction() {
    let completed = |completed_at: DateTime<Utc>| {
        let started_at = Some(completed_at - TimeDelta::seconds(5));
        let build = WorkspaceBuildCompleted { started_at, completed_at, ..build() };
        let claim = PrebuildClaimed { started_at, completed_at, ..claim() };
        [fact(build), fact(claim)]
    };
    gives(completed(introduced_at() - TimeDelta::microseconds(1)), [CREATED]);
    gives(
        completed(introduced_at()),
        [
            CREATED,
            "creation engineering/docker/small/regular 1 5s",
            "claim engineering/docker/small 1 5s",
        ],
    );
}

#[test]
fn a_workspace_without_a_preset_has_an_empty_label() {
    let without =
        WorkspaceBuildCompleted { preset_id: None, preset_name: String::new(), ..build() };
    gives(
        [fact(without)],
        ["creations engineering/docker/ 1", "creation engineering/docker//regular 1 42s"],
    );
}

#[test]
fn label_values_that_run_into_each_other_stay_two_series() {
    let named = |organization: &str, template: &str| {
        fact(WorkspaceBuildCompleted {
            organization_name: organization.into(),
            template_name: template.into(),
            ..build()
        })
    };
    let metrics = after([named("a", "bc"), named("ab", "c"), named("ab", "c")]);
    assert_eq!(
        lines(&metrics),
        [
            "creations a/bc/small 1",
            "creations ab/c/small 2",
            "creation a/bc/small/regular 1 42s",
            "creation ab/c/small/regular 2 84s"
        ]
    );
}

#[test]
fn a_baseline_is_counted_without_a_time() {
    let series = ["engineering", "docker", "small"].map(str::to_owned);
    let baseline = Fact::Baseline { deployment: DEPLOYMENT, series, creations: 1200 };
    let metrics = after([baseline, fact(build())]);
    let counter = metrics.creations.get(["engineering", "docker", "small"]).unwrap();
    assert_eq!((counter.value, counter.created), (1201, DateTime::UNIX_EPOCH));
}

#[test]
fn a_series_keeps_the_time_of_its_first_event_if_an_earlier_one_follows() {
    let earlier = WorkspaceBuildCompleted {
        completed_at: introduced_at() + TimeDelta::minutes(5),
        ..build()
    };
    let metrics = after([fact(build()), fact(earlier)]);
    let first = build().completed_at;
    assert_eq!(metrics.creations.get(["engineering", "docker", "small"]).unwrap().created, first);
    let timed =
        metrics.creation_seconds.get(["engineering", "docker", "small", "regular"]).unwrap();
    assert_eq!(timed.buckets.created, first);
}

#[test]
fn usage_and_licenses_add_nothing() {
    use crate::event::UsageQuantity::{AgentRuntimeMs, AiSeats, ManagedAgents};
    let license = Fact::License {
        deployment: DEPLOYMENT,
        license_id: 1,
        jwt_sha256: [1; 32],
        present: true,
        claims: None,
    };
    let facts = [ManagedAgents(1), AiSeats(2), AgentRuntimeMs(3)]
        .map(|quantity| fact(usage(quantity, introduced_at())));
    gives(facts.into_iter().chain([license]), []);
}

#[test]
fn deployments_are_kept_apart() {
    let other = Uuid::from_u128(0xd2);
    let of_other = Fact::Event(Event { deployment: other, payload: build().into() });
    let state = fold(&[introduced(DEPLOYMENT), introduced(other), of_other]);
    let counted: Vec<_> =
        state.deployments().map(|(id, metrics)| (id, lines(metrics).len())).collect();
    assert_eq!(counted, [(DEPLOYMENT, 0), (other, 2)]);
}

#[test]
fn facts_that_violate_the_ledgers_invariants_are_refused_and_change_nothing() {
    let mut state = MetricsState::default();
    assert_eq!(state.apply(&fact(build())), Err(LedgerFault::NotIntroduced(DEPLOYMENT)));
    assert_eq!(state, MetricsState::default());
    state.apply(&introduced(DEPLOYMENT)).unwrap();
    state.apply(&fact(build())).unwrap();
    let before = state.clone();
    assert_eq!(state.apply(&introduced(DEPLOYMENT)), Err(LedgerFault::IntroducedTwice(DEPLOYMENT)));
    assert_eq!(state, before);
}

#[test]
fn the_families_are_coderds() {
    let metrics = after([fact(build()), fact(claim())]);
    let families = metrics.families();
    let text = String::from_utf8(
        crate::metrics::encode(&families[..3], crate::metrics::Format::Text).unwrap().1,
    )
    .unwrap();
    let bounds = |name: &str| -> Vec<&str> {
        let bucket = format!("{name}_bucket{{");
        text.lines()
            .filter(|line| line.starts_with(&bucket))
            .filter_map(|line| line.split("le=\"").nth(1)?.split('"').next())
            .collect()
    };
    assert_eq!(
        bounds("coderd_workspace_creation_duration_seconds"),
        ["1", "10", "30", "60", "300", "600", "1800", "3600", "+Inf"]
    );
    assert_eq!(
        bounds("coderd_prebuilt_workspace_claim_duration_seconds"),
        ["1", "5", "10", "20", "30", "60", "120", "180", "240", "300", "+Inf"]
    );
    let total = "coderd_workspace_creation_total{organization_name=\"engineering\",preset_name=\"small\",template_name=\"docker\"} 1";
    assert!(text.lines().any(|line| line == total), "{text}");
    assert_eq!(
        CREATION_SECONDS.labels,
        ["organization_name", "template_name", "preset_name", "type"]
    );
}

/// Events of a few series, all completed at one instant, so that created timestamps do not depend
/// on their order. Durations need at most 100 native buckets.
fn facts() -> impl Strategy<Value = Vec<Fact>> {
    let stage =
        prop_oneof![Just(None), Just(Some(InputStage::Create)), Just(Some(InputStage::Claim))];
    let status = prop_oneof![3 => Just(BuildStatus::Succeeded), 1 => Just(BuildStatus::Failed)];
    let made = (
        "[ab]{0,2}",
        "[ab]{0,2}",
        prop_oneof![9 => 1_000_000..3_600_000_000_i64, 1 => Just(-5), 1 => Just(0)],
        stage,
        status,
        1..4,
    );
    let event = (made, any::<bool>(), any::<bool>()).prop_map(
        |((organization, template, micros, stage, status, number), claimed, first)| {
            let started_at = Some(build().completed_at - TimeDelta::microseconds(micros));
            if claimed {
                return fact(PrebuildClaimed {
                    organization_name: organization,
                    template_name: template,
                    started_at,
                    status,
                    ..claim()
                });
            }
            fact(WorkspaceBuildCompleted {
                organization_name: organization,
                template_name: template,
                started_at,
                status,
                stage,
                build_number: number,
                first_successful_start: first && status == BuildStatus::Succeeded,
                ..build()
            })
        },
    );
    prop::collection::vec(event, 0..120)
}

fn fold_introduced() -> MetricsState {
    let mut state = MetricsState::default();
    state.apply(&introduced(DEPLOYMENT)).unwrap();
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_order_of_partitions_does_not_matter((one, other) in facts().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))) {
        prop_assert_eq!(after(one), after(other));
    }

    #[test]
    fn a_fold_from_saved_pieces_is_bit_for_bit_that_from_zero(facts in facts(), saves in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let facts = [vec![introduced(DEPLOYMENT)], facts].concat();
        let mut ends: Vec<usize> = saves.iter().map(|save| save.index(facts.len() + 1)).collect();
        ends.sort_unstable();
        let (mut state, mut saved, mut done) = (MetricsState::default(), Saved::new(), 0);
        for end in ends {
            facts[done..end].iter().for_each(|fact| state.apply(fact).unwrap());
            save(&mut state, &mut saved);
            prop_assert_eq!(&saved, &pieces(&state), "unchanged pieces are as they were saved");
            state = load(&saved);
            done = end;
        }
        facts[done..].iter().for_each(|fact| state.apply(fact).unwrap());
        let mut whole = MetricsState::default();
        facts.iter().for_each(|fact| whole.apply(fact).unwrap());
        prop_assert_eq!(pieces(&state), pieces(&whole));
        prop_assert_eq!(state, whole);
    }

    #[test]
    fn any_bytes_are_a_piece_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..60), number in -2..500_000_i64, part in 0..7_usize, json in "[\\[\\]{}\",a-z0-9:]{0,40}") {
        let own = load::<MetricsState>(&pieces(&fold_introduced()));
        for content in [bytes, [b"\x01", json.as_bytes()].concat()] {
            let mut state = own.clone();
            let piece = Piece { deployment: DEPLOYMENT, part: Part::WORDS[part].0, number };
            if state.decode(piece, &content).is_ok() {
                let saved = pieces(&state);
                prop_assert_eq!(load::<MetricsState>(&saved), state);
            }
        }
    }
}

#[test]
fn the_snapshots_form_is_pinned() {
    let started_at = Some(at("2025-08-01T12:59:59Z"));
    let state =
        fold(&[introduced(DEPLOYMENT), fact(WorkspaceBuildCompleted { started_at, ..build() })]);
    let lines: Vec<String> = pieces(&state)
        .iter()
        .map(|(name, content)| format!("{name} {}", content.escape_ascii()))
        .collect();
    let pinned = include_str!("metrics_snapshot.txt").trim_end();
    assert_eq!(lines.join("\n"), pinned, "a changed form needs a new RULES_VERSION");
}
