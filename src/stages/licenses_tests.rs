//! Tests of licenses that appear and disappear, and of agents counted in the window of the
//! effective license.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::license::Entitlement;
use crate::stages::pieces::{Part, Piece};
use crate::stages::samples::{DEPLOYMENT, at, build, fact, introduced, introduced_at, usage};
use crate::stages::samples::{Saved, load, pieces, save};

const NEVER: [u8; 32] = [0xee; 32];

/// Soft limit 10, hard limit 20; valid from half past ten on 1 August for a year, with a month of
/// grace.
fn claims(issued_at: &str) -> LicenseClaims {
    LicenseClaims {
        issued_at: at(issued_at),
        not_before: at("2025-08-01T10:30:00Z"),
        license_expires: at("2026-08-01T10:30:00Z"),
        expires_at: at("2026-09-01T10:30:00Z"),
        token_id: None,
        account_type: "salesforce".into(),
        account_id: "account-1".into(),
        deployment_ids: Vec::new(),
        trial: false,
        feature_set: String::new(),
        all_features: false,
        features: BTreeMap::from([
            ("managed_agent_limit_soft".into(), 10),
            ("managed_agent_limit_hard".into(), 20),
        ]),
        addons: Vec::new(),
        require_telemetry: false,
        publish_usage_data: true,
    }
}

fn added(license_id: i32, hash: u8, claims: Option<LicenseClaims>) -> Fact {
    let claims = claims.map(|claims| serde_json::to_value(claims).unwrap());
    Fact::License {
        deployment: DEPLOYMENT,
        license_id,
        jwt_sha256: [hash; 32],
        present: true,
        claims,
    }
}

fn removed(license_id: i32, jwt_sha256: [u8; 32]) -> Fact {
    Fact::License { deployment: DEPLOYMENT, license_id, jwt_sha256, present: false, claims: None }
}

fn started(count: u64, created_at: &str) -> Fact {
    fact(usage(UsageQuantity::ManagedAgents(count), at(created_at)))
}

fn after(facts: impl IntoIterator<Item = Fact>) -> DeploymentLicenses {
    let mut state = LicensesState::default();
    for fact in std::iter::once(introduced(DEPLOYMENT)).chain(facts) {
        state.apply(&fact).unwrap();
    }
    state.deployment(DEPLOYMENT).unwrap().clone()
}

fn answer_of(licenses: &DeploymentLicenses) -> Entitlements {
    licenses.entitlements(RuleSet::Y2025M07, at("2025-10-01T00:00:00Z"))
}

#[test]
fn agents_count_from_the_licenses_start_to_before_its_end() {
    let licenses = after([
        added(1, 1, Some(claims("2025-08-01T09:00:00Z"))),
        started(100, "2025-08-01T10:29:59.999999Z"),
        started(1, "2025-08-01T10:30:00Z"),
        started(2, "2026-09-01T10:29:59.999999Z"),
        started(100, "2026-09-01T10:30:00Z"),
    ]);
    let answer = answer_of(&licenses);
    assert_eq!(answer.managed_agents().actual, Some(3));
    let period = answer.managed_agents().usage_period.unwrap();
    assert_eq!(
        licenses.agents.count_whole_days(period.start, period.end),
        203,
        "coderd's own way takes both days whole"
    );
}

#[test]
fn only_managed_agents_are_counted() {
    let other = [UsageQuantity::AiSeats(7), UsageQuantity::AgentRuntimeMs(9)]
        .map(|quantity| fact(usage(quantity, introduced_at())));
    let licenses = after(other.into_iter().chain([fact(build())]));
    assert_eq!(licenses, DeploymentLicenses::default());
}

#[test]
fn a_removed_license_grants_nothing_and_removing_an_unknown_one_is_allowed() {
    let (first, second) = (claims("2025-08-01T09:00:00Z"), claims("2025-08-02T09:00:00Z"));
    let both = after([added(1, 1, Some(first.clone())), added(2, 2, Some(second))]);
    assert_eq!(
        answer_of(&both).managed_agents().usage_period.unwrap().issued_at,
        at("2025-08-02T09:00:00Z")
    );
    let one = after([
        added(1, 1, Some(first.clone())),
        added(2, 2, None),
        removed(2, [2; 32]),
        removed(3, NEVER),
    ]);
    assert_eq!(answer_of(&one).managed_agents().usage_period.unwrap().issued_at, first.issued_at);
    let none = after([added(1, 1, Some(first)), removed(1, [1; 32])]);
    assert_eq!(answer_of(&none).managed_agents().entitlement, Entitlement::NotEntitled);
    assert!(!answer_of(&none).has_license);
}

#[test]
fn licenses_are_ordered_by_coderds_ids() {
    let trial = |trial| Some(LicenseClaims { trial, ..claims("2025-08-01T09:00:00Z") });
    let licenses =
        after([added(9, 9, trial(true)), added(3, 3, trial(false)), added(5, 5, trial(false))]);
    assert_eq!(
        licenses.licenses.iter().map(|license| license.license_id).collect::<Vec<_>>(),
        [3, 5, 9]
    );
    assert!(answer_of(&licenses).trial, "the last one says whether it is a trial");
    // Removed from coderd and uploaded again: another id, the same license.
    let again = after([added(3, 3, trial(false)), added(9, 3, trial(false))]);
    assert_eq!(again.licenses.iter().map(|license| license.license_id).collect::<Vec<_>>(), [9]);
}

#[test]
fn a_token_that_did_not_verify_is_an_error_and_grants_nothing() {
    let answer = answer_of(&after([added(4, 4, None)]));
    assert_eq!(answer.errors, ["Invalid license (id 4): its token did not verify"]);
    assert!(!answer.has_license);
}

#[test]
fn agents_beyond_64_bits_are_shown_as_the_maximum() {
    let licenses = after([
        added(1, 1, Some(claims("2025-08-01T09:00:00Z"))),
        started(u64::MAX, "2025-09-01T00:00:00Z"),
        started(u64::MAX, "2025-09-01T00:00:00Z"),
    ]);
    assert_eq!(answer_of(&licenses).managed_agents().actual, Some(i64::MAX));
}

#[test]
fn facts_that_violate_the_ledgers_invariants_are_refused_and_change_nothing() {
    let mut state = LicensesState::default();
    assert_eq!(
        state.apply(&started(1, "2025-09-01T00:00:00Z")),
        Err(LedgerFault::NotIntroduced(DEPLOYMENT))
    );
    assert_eq!(state, LicensesState::default());
    state.apply(&introduced(DEPLOYMENT)).unwrap();
    assert_eq!(state.apply(&introduced(DEPLOYMENT)), Err(LedgerFault::IntroducedTwice(DEPLOYMENT)));
    let (known, claims) = (state.clone(), Some(serde_json::json!({ "no_such_claim": 1 })));
    let license = Fact::License {
        deployment: DEPLOYMENT,
        license_id: 7,
        jwt_sha256: [7; 32],
        present: true,
        claims,
    };
    let broken = state.apply(&license).unwrap_err().to_string();
    assert!(
        broken.starts_with("the claims of license 7 are not readable: unknown field"),
        "{broken}"
    );
    assert_eq!(state, known);
}

#[test]
fn the_snapshots_form_is_pinned() {
    let mut state = LicensesState::default();
    let facts = [
        introduced(DEPLOYMENT),
        added(1, 1, Some(claims("2025-08-01T09:00:00Z"))),
        added(2, 2, None),
        started(3, "2025-09-01T00:00:00.000001Z"),
    ];
    facts.iter().for_each(|fact| state.apply(fact).unwrap());
    let lines: Vec<String> = pieces(&state)
        .iter()
        .map(|(name, content)| format!("{name} {}", content.escape_ascii()))
        .collect();
    let pinned = include_str!("licenses_snapshot.txt").trim_end();
    assert_eq!(lines.join("\n"), pinned, "a changed form needs a new RULES_VERSION");
}

fn facts() -> impl Strategy<Value = Vec<Fact>> {
    let day = 86_400_000_000_i64;
    let usage = (1..5_u64, 0..30 * day).prop_map(|(count, micros)| {
        fact(usage(
            UsageQuantity::ManagedAgents(count),
            introduced_at() + chrono::TimeDelta::microseconds(micros),
        ))
    });
    let license = (1..5_u8, any::<bool>(), any::<bool>()).prop_map(|(hash, present, verified)| {
        let claims = (present && verified)
            .then(|| serde_json::to_value(claims("2025-08-01T09:00:00Z")).unwrap());
        Fact::License {
            deployment: DEPLOYMENT,
            license_id: i32::from(hash),
            jwt_sha256: [hash; 32],
            present,
            claims,
        }
    });
    prop::collection::vec(prop_oneof![9 => usage, 1 => license], 0..700)
}

fn fold_introduced() -> LicensesState {
    let mut state = LicensesState::default();
    state.apply(&introduced(DEPLOYMENT)).unwrap();
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_fold_from_saved_pieces_is_bit_for_bit_that_from_zero(facts in facts(), saves in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let facts = [vec![introduced(DEPLOYMENT)], facts].concat();
        let mut ends: Vec<usize> = saves.iter().map(|save| save.index(facts.len() + 1)).collect();
        ends.sort_unstable();
        let (mut state, mut saved, mut done) = (LicensesState::default(), Saved::new(), 0);
        for end in ends {
            facts[done..end].iter().for_each(|fact| state.apply(fact).unwrap());
            save(&mut state, &mut saved);
            prop_assert_eq!(&saved, &pieces(&state), "unchanged pieces are as they were saved");
            state = load(&saved);
            done = end;
        }
        facts[done..].iter().for_each(|fact| state.apply(fact).unwrap());
        let mut whole = LicensesState::default();
        facts.iter().for_each(|fact| whole.apply(fact).unwrap());
        prop_assert_eq!(pieces(&state), pieces(&whole));
        prop_assert_eq!(state, whole);
    }

    #[test]
    fn any_bytes_are_a_piece_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..60), number in -2..500_000_i64, part in 0..7_usize, json in "[\\[\\]{}\",a-z0-9:]{0,40}") {
        let own = load::<LicensesState>(&pieces(&fold_introduced()));
        for content in [bytes, [b"\x01", json.as_bytes()].concat()] {
            let mut state = own.clone();
            let piece = Piece { deployment: DEPLOYMENT, part: Part::WORDS[part].0, number };
            if state.decode(piece, &content).is_ok() {
                let saved = pieces(&state);
                prop_assert_eq!(load::<LicensesState>(&saved), state);
            }
        }
    }

    #[test]
    fn agents_add_up_in_any_order((one, other) in facts().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))) {
        let (one, other) = (after(one), after(other));
        prop_assert_eq!(&one.agents, &other.agents);
    }
}

#[test]
fn a_correction_replaces_what_was_counted() {
    let event = |count, created_at| {
        let Fact::Event(event) = started(count, created_at) else { unreachable!("an event") };
        Some(Box::new(event))
    };
    let corrected = |before, after| Fact::Corrected { deployment: DEPLOYMENT, before, after };
    let (early, late) = ("2025-08-01T11:00:00Z", "2025-08-02T11:00:00Z");
    let forged = || [started(7, early), started(7, early), started(1, late)];
    let after_facts = |more: Fact| after(forged().into_iter().chain([more]));
    assert_eq!(
        after_facts(corrected(event(7, early), event(2, late))).agents,
        after([started(7, early), started(1, late), started(2, late)]).agents
    );
    assert_eq!(
        after_facts(corrected(event(7, early), None)).agents,
        after([started(7, early), started(1, late)]).agents
    );
    assert_eq!(
        after_facts(corrected(None, event(7, early))).agents,
        after([started(7, early), started(7, early), started(7, early), started(1, late)]).agents
    );
    assert_eq!(after_facts(corrected(None, None)), after(forged()));
}

#[test]
fn a_correction_of_an_event_that_is_not_counted_is_a_fault_and_changes_nothing() {
    let Fact::Event(event) = started(7, "2025-08-01T11:00:00Z") else { unreachable!("an event") };
    let mut state = LicensesState::default();
    state.apply(&introduced(DEPLOYMENT)).unwrap();
    let before = state.clone();
    let correction = Fact::Corrected {
        deployment: DEPLOYMENT,
        before: Some(Box::new(event.clone())),
        after: Some(Box::new(event)),
    };
    assert_eq!(state.apply(&correction), Err(LedgerFault::NotCounted(DEPLOYMENT)));
    assert_eq!(state, before);
}
