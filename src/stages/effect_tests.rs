//! Tests of the effect of one event on the series.

use super::*;
use crate::event::{Fact, UsageQuantity};
use crate::stages::samples;
use crate::stages::samples::{build, claim, introduced_at, usage};

fn event(fact: Fact) -> Event {
    let Fact::Event(event) = fact else { panic!("not an event") };
    event
}

fn why(fact: Fact) -> Vec<(&'static str, NoEffectReason)> {
    let effects = effects_of(&event(fact), introduced_at());
    effects.unaffected.iter().map(|unaffected| (unaffected.family, unaffected.why)).collect()
}

#[test]
fn an_effect_has_family_labels_and_value() {
    let effects = effects_of(&event(samples::fact(build())), introduced_at());
    let labels = vec![
        ("organization_name", "engineering"),
        ("template_name", "docker"),
        ("preset_name", "small"),
    ];
    let added: Vec<_> = effects
        .added
        .iter()
        .map(|effect| (effect.family(), effect.observed_micros(), effect.labels()))
        .collect();
    let timed = [labels.clone(), vec![("type", "regular")]].concat();
    assert_eq!(
        added,
        [
            ("coderd_workspace_creation_total", None, labels),
            ("coderd_workspace_creation_duration_seconds", Some(42_000_000), timed)
        ]
    );
    assert!(effects.unaffected.is_empty());
    let usage = samples::fact(usage(UsageQuantity::ManagedAgents(3), introduced_at()));
    assert_eq!(effects_of(&event(usage), introduced_at()), Effects::default());
}

#[test]
fn a_success_that_ends_as_it_starts_is_observed_as_0_and_a_reaped_job_is_not() {
    let at_once = WorkspaceBuildCompleted { started_at: Some(build().completed_at), ..build() };
    let effects = effects_of(&event(samples::fact(at_once.clone())), introduced_at());
    assert_eq!(effects.added.iter().filter_map(Effect::observed_micros).collect::<Vec<_>>(), [0]);
    assert!(!effects.added.iter().any(|effect| matches!(effect, Effect::NegativeDuration(_))));
    let claimed = PrebuildClaimed { started_at: Some(claim().completed_at), ..claim() };
    let effects = effects_of(&event(samples::fact(claimed)), introduced_at());
    assert_eq!(effects.added.iter().filter_map(Effect::observed_micros).collect::<Vec<_>>(), [0]);
    let reaped = WorkspaceBuildCompleted {
        status: BuildStatus::Failed,
        first_successful_start: false,
        ..at_once
    };
    assert_eq!(reaped.duration(), None);
    assert_eq!(effects_of(&event(samples::fact(reaped)), introduced_at()).added, []);
}

#[test]
fn an_unaffected_family_has_a_reason() {
    let (total, seconds) = (CREATIONS.name, CREATION_SECONDS.name);
    let failed = WorkspaceBuildCompleted {
        status: BuildStatus::Failed,
        first_successful_start: false,
        ..build()
    };
    assert_eq!(
        why(samples::fact(failed)),
        [(total, NoEffectReason::NotTheFirstStart), (seconds, NoEffectReason::NotSucceeded)]
    );
    assert_eq!(
        why(samples::fact(samples::pool_build())),
        [(total, NoEffectReason::ByThePrebuildsUser)]
    );
    assert_eq!(
        why(samples::fact(samples::claim_build())).last(),
        Some(&(seconds, NoEffectReason::NoCreation))
    );
    let unstarted = WorkspaceBuildCompleted { started_at: None, ..build() };
    assert_eq!(why(samples::fact(unstarted)), [(seconds, NoEffectReason::NoDuration)]);
    let early =
        PrebuildClaimed { completed_at: introduced_at() - TimeDelta::microseconds(1), ..claim() };
    assert_eq!(
        why(samples::fact(early)),
        [(CLAIM_SECONDS.name, NoEffectReason::BeforeTheIntroduction)]
    );
}
