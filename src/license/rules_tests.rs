//! coderd's own cases for managed agents, and edge cases.

use std::cell::Cell;
use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;

use super::*;

const SOFT: &str = "managed_agent_limit_soft";
const HARD: &str = "managed_agent_limit_hard";

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a time")
}

fn now() -> DateTime<Utc> {
    at("2025-10-01T12:00:00Z")
}

/// A plain license: issued and valid from the middle of 1 August 2025, paid for a year, with a
/// month of grace.
fn license(features: &[(&str, i64)]) -> LicenseClaims {
    LicenseClaims {
        issued_at: at("2025-08-01T09:30:00Z"),
        not_before: at("2025-08-01T10:30:00Z"),
        license_expires: at("2026-08-01T10:30:00Z"),
        expires_at: at("2026-09-01T10:30:00Z"),
        token_id: Some("one".to_owned()),
        account_type: "salesforce".to_owned(),
        account_id: "account-1".to_owned(),
        deployment_ids: Vec::new(),
        trial: false,
        feature_set: String::new(),
        all_features: false,
        features: features
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect::<BTreeMap<_, _>>(),
        addons: Vec::new(),
        require_telemetry: false,
        publish_usage_data: true,
    }
}

fn premium(features: &[(&str, i64)]) -> LicenseClaims {
    LicenseClaims { feature_set: "premium".to_owned(), ..license(features) }
}

fn later(days: i64, license: LicenseClaims) -> LicenseClaims {
    LicenseClaims { issued_at: license.issued_at + TimeDelta::days(days), ..license }
}

fn judged(rules: RuleSet, licenses: &[LicenseClaims], actual: u64) -> Entitlements {
    entitlements(rules, licenses, now(), |_, _| actual)
}

fn of_2025(licenses: &[LicenseClaims], actual: u64) -> Entitlements {
    judged(RuleSet::Y2025M07, licenses, actual)
}

fn limits(answer: &Entitlements) -> (Entitlement, bool, Option<i64>, Option<i64>) {
    let agents = answer.managed_agents();
    (agents.entitlement, agents.enabled, agents.soft_limit, agents.limit)
}

fn is_not_entitled(answer: &Entitlements) {
    assert_eq!(*answer.managed_agents(), Feature::not_entitled());
}

#[test]
fn missing_grouped_feature() {
    for key in [SOFT, HARD] {
        let answer = of_2025(&[license(&[(key, 100)])], 0);
        is_not_entitled(&answer);
        assert_eq!(
            answer.errors,
            [
                "Invalid license (one): feature managed_agent_limit has missing soft or hard limit values"
            ]
        );
        assert!(answer.has_license, "the license itself is good");
    }
    let negative = of_2025(&[license(&[(SOFT, 100), (HARD, -1)])], 0);
    assert_eq!(negative.errors.len(), 1, "a negative value counts as absent");
}

#[test]
fn hard_below_soft() {
    let answer = of_2025(&[license(&[(SOFT, 100), (HARD, 99)])], 0);
    is_not_entitled(&answer);
    assert_eq!(
        answer.errors,
        [
            "Invalid license (one): feature managed_agent_limit has a hard limit less than the soft limit"
        ]
    );
}

#[test]
fn a_premium_license_with_bad_keys_has_no_default() {
    is_not_entitled(&of_2025(&[premium(&[(SOFT, 100), ("user_limit", 10)])], 0));
}

#[test]
fn issued_at_ranking() {
    let older = license(&[(SOFT, 150), (HARD, 300)]);
    let newer = LicenseClaims {
        not_before: at("2025-09-01T00:00:00.000001Z"),
        ..later(20, license(&[(SOFT, 100), (HARD, 200)]))
    };
    for order in [[older.clone(), newer.clone()], [newer.clone(), older]] {
        let counted = Cell::new(None);
        let answer = entitlements(RuleSet::Y2025M07, &order, now(), |start, end| {
            assert_eq!(counted.replace(Some((start, end))), None, "counted once");
            7
        });
        assert_eq!(limits(&answer), (Entitlement::Entitled, true, Some(100), Some(200)));
        assert_eq!(answer.managed_agents().actual, Some(7));
        let period = UsagePeriod {
            issued_at: newer.issued_at,
            start: newer.not_before,
            end: newer.expires_at,
        };
        assert_eq!(answer.managed_agents().usage_period, Some(period));
        assert_eq!(counted.get(), Some((newer.not_before, newer.expires_at)));
    }
}

#[test]
fn ties_go_by_end_then_entitlement_then_limit_then_the_first() {
    let limited = |hard| license(&[(SOFT, 1), (HARD, hard)]);
    let longer = LicenseClaims { expires_at: at("2026-10-01T00:00:00Z"), ..limited(50) };
    let grace = LicenseClaims { license_expires: at("2025-09-30T00:00:00Z"), ..limited(500) };
    for (pair, hard) in [
        ([limited(100), longer], 50),
        ([limited(100), grace], 100),
        ([limited(100), limited(90)], 100),
    ] {
        for order in [pair.clone(), [pair[1].clone(), pair[0].clone()]] {
            assert_eq!(of_2025(&order, 0).managed_agents().limit, Some(hard));
        }
    }
    let softer = license(&[(SOFT, 99), (HARD, 100)]);
    assert_eq!(
        of_2025(&[limited(100), softer.clone()], 0).managed_agents().soft_limit,
        Some(1),
        "soft limits are not compared"
    );
    assert_eq!(of_2025(&[softer, limited(100)], 0).managed_agents().soft_limit, Some(99));
}

#[test]
fn enterprise_has_no_default() {
    for enterprise in [
        LicenseClaims { feature_set: "enterprise".to_owned(), ..license(&[("user_limit", 10)]) },
        LicenseClaims { all_features: true, ..license(&[("user_limit", 10)]) },
    ] {
        let answer = entitlements(RuleSet::Y2025M07, &[enterprise], now(), |_, _| {
            unreachable!("nothing to count")
        });
        is_not_entitled(&answer);
        assert!(answer.has_license);
        assert_eq!(answer.errors, Vec::<String>::new());
    }
}

#[test]
fn premium_default_goes_by_the_user_limit() {
    let answer = of_2025(&[premium(&[("user_limit", 10)])], 5);
    assert_eq!(limits(&answer), (Entitlement::Entitled, true, Some(8_000), Some(10_000)));
    let start = at("2025-07-01T00:00:00Z");
    let period = UsagePeriod { issued_at: start, start, end: at("2125-07-01T00:00:00Z") };
    assert_eq!(
        (answer.managed_agents().actual, answer.managed_agents().usage_period),
        (Some(5), Some(period))
    );
    is_not_entitled(&of_2025(&[premium(&[])], 0));
    is_not_entitled(&of_2025(&[premium(&[("user_limit", 0)])], 0));
    let negative = of_2025(&[premium(&[("user_limit", 10), (SOFT, -1), (HARD, -5)])], 0);
    assert_eq!(negative.managed_agents().limit, Some(10_000), "negative values count as absent");
}

#[test]
fn premium_explicit_values_win_over_the_default_of_any_license() {
    let explicit = LicenseClaims {
        issued_at: at("2025-07-01T00:00:00.000001Z"),
        ..premium(&[("user_limit", 10), (SOFT, 5), (HARD, 6)])
    };
    for order in [
        [explicit.clone(), premium(&[("user_limit", 10)])],
        [premium(&[("user_limit", 10)]), explicit],
    ] {
        assert_eq!(limits(&of_2025(&order, 0)), (Entitlement::Entitled, true, Some(5), Some(6)));
    }
}

#[test]
fn explicit_zero_is_entitled_but_disabled() {
    let answer = of_2025(&[premium(&[("user_limit", 10), (SOFT, 0), (HARD, 0)])], 3);
    assert_eq!(limits(&answer), (Entitlement::Entitled, false, Some(0), Some(0)));
    assert_eq!((answer.managed_agents().actual, answer.warnings.len()), (Some(3), 0));
}

#[test]
fn the_bare_key_is_forbidden_in_2025() {
    let answer = of_2025(&[license(&[(MANAGED_AGENT_LIMIT, 100)])], 0);
    is_not_entitled(&answer);
    assert_eq!(answer.errors, ["Feature managed_agent_limit is forbidden to be set in a license."]);
    let beside = of_2025(&[license(&[(MANAGED_AGENT_LIMIT, 100), (SOFT, 1), (HARD, 2)])], 0);
    assert_eq!(
        (beside.managed_agents().limit, beside.errors.len()),
        (Some(2), 1),
        "the rest of the license counts"
    );
}

#[test]
fn unlicensed_is_not_entitled_but_free() {
    let expired = LicenseClaims { expires_at: now(), ..license(&[(SOFT, 1), (HARD, 2)]) };
    let to_come = LicenseClaims {
        not_before: now() + TimeDelta::microseconds(1),
        ..license(&[(SOFT, 1), (HARD, 2)])
    };
    for licenses in [vec![], vec![expired, to_come]] {
        let answer = of_2025(&licenses, 1000);
        is_not_entitled(&answer);
        assert!(!answer.has_license);
        assert!(answer.errors.is_empty(), "a license that is not valid yet is skipped silently");
    }
}

#[test]
fn in_grace_the_limits_are_unchanged() {
    let grace = LicenseClaims {
        license_expires: at("2025-09-30T00:00:00Z"),
        ..license(&[(SOFT, 100), (HARD, 100)])
    };
    let answer = of_2025(&[grace], 74);
    assert_eq!(limits(&answer), (Entitlement::GracePeriod, true, Some(100), Some(100)));
    assert_eq!(answer.warnings, Vec::<String>::new());
}

#[test]
fn warnings_begin_at_their_thresholds() {
    let warning = |soft, hard, actual| {
        let warnings = of_2025(&[license(&[(SOFT, soft), (HARD, hard)])], actual).warnings;
        assert!(warnings.len() <= 1);
        warnings
            .first()
            .map(|warning| if warning.contains("blocked") { "breached" } else { "approaching" })
    };
    for (soft, hard, actual, expected) in [
        (100, 200, 174, None),
        (100, 200, 175, Some("approaching")),
        (100, 200, 199, Some("approaching")),
        (100, 200, 200, Some("breached")),
        (100, 100, 74, None),
        (100, 100, 75, Some("approaching")),
        (100, 100, 100, Some("breached")),
        (0, 101, 74, None),
        (0, 101, 75, Some("approaching")),
        (1, 4, 2, None),
        (1, 4, 3, Some("approaching")),
        (i64::MAX, i64::MAX, 0, None),
        (i64::MAX, i64::MAX, u64::MAX, Some("breached")),
    ] {
        assert_eq!(
            warning(soft, hard, actual),
            expected,
            "soft {soft}, hard {hard}, actual {actual}"
        );
    }
}

#[test]
fn since_2026_either_key_is_the_one_limit() {
    let of_2026 = |license, actual| judged(RuleSet::Y2026M02, &[license], actual);
    for features in [
        &[(MANAGED_AGENT_LIMIT, 100)][..],
        &[(SOFT, 100)],
        &[(SOFT, 100), (HARD, 7)],
        &[(MANAGED_AGENT_LIMIT, 100), (SOFT, 5)],
    ] {
        let answer = of_2026(license(features), 99);
        assert_eq!(limits(&answer), (Entitlement::Entitled, true, None, Some(100)), "{features:?}");
        assert!(answer.warnings.is_empty() && answer.errors.is_empty());
        assert_eq!(of_2026(license(features), 100).warnings.len(), 1);
    }
    is_not_entitled(&of_2026(license(&[(HARD, 7)]), 0));
    assert_eq!(limits(&of_2026(premium(&[]), 0)), (Entitlement::Entitled, true, None, Some(1000)));
    assert_eq!(
        limits(&of_2026(premium(&[(MANAGED_AGENT_LIMIT, 0)]), 0)),
        (Entitlement::Entitled, false, None, Some(0))
    );
}

#[test]
fn flags_are_gathered_over_all_licenses() {
    let trial = LicenseClaims { trial: true, require_telemetry: true, ..license(&[]) };
    let answer = of_2025(&[trial.clone(), license(&[])], 0);
    assert!(
        answer.has_license && !answer.trial && answer.require_telemetry,
        "the last one says whether it is a trial"
    );
    assert!(of_2025(&[license(&[]), trial], 0).trial);
}

#[test]
fn a_term_too_long_is_an_error_and_grants_nothing() {
    let endless = LicenseClaims {
        license_expires: at("2031-01-01T00:00:00Z"),
        ..license(&[(SOFT, 1), (HARD, 2)])
    };
    let answer = of_2025(&[endless], 0);
    is_not_entitled(&answer);
    assert_eq!((answer.has_license, answer.errors.len()), (false, 1));
}

#[test]
fn the_end_of_the_paid_term_gives_a_warning() {
    let ending = |left: TimeDelta| LicenseClaims { license_expires: now() + left, ..license(&[]) };
    let warnings = |licenses: &[LicenseClaims]| of_2025(licenses, 0).warnings;
    let (day, tick) = (TimeDelta::days(1), TimeDelta::microseconds(1));
    assert_eq!(warnings(&[ending(day * 29)]), ["Your license expires in 29 days."]);
    assert_eq!(
        warnings(&[ending(day * 28 + tick)]),
        ["Your license expires in 29 days."],
        "days are rounded up"
    );
    assert_eq!(warnings(&[ending(day * 29 + tick)]), Vec::<String>::new());
    assert_eq!(warnings(&[ending(tick)]), ["Your license expires in 1 day."]);
    assert_eq!(warnings(&[ending(TimeDelta::zero())]), Vec::<String>::new());
    let trial = |left| LicenseClaims { trial: true, ..ending(left) };
    assert_eq!(warnings(&[trial(day * 7)]), Vec::<String>::new());
    assert_eq!(warnings(&[trial(day * 6)]), ["Your license expires in 6 days."]);
    let next = |gap: TimeDelta| LicenseClaims { not_before: now() + day * 5 + gap, ..license(&[]) };
    assert_eq!(
        warnings(&[next(TimeDelta::zero()), ending(day * 5)]),
        Vec::<String>::new(),
        "it goes on without a gap"
    );
    assert_eq!(warnings(&[next(tick), ending(day * 5)]), ["Your license expires in 5 days."]);
}

#[test]
fn the_shape_is_that_of_coderd() {
    let limited = license(&[(SOFT, 100), (HARD, 200)]);
    let answer = serde_json::to_value(of_2025(&[limited], 200)).expect("JSON");
    let expected = json!({
        "features": {"managed_agent_limit": {
            "entitlement": "entitled", "enabled": true, "limit": 200, "soft_limit": 100, "actual": 200,
            "usage_period": {"issued_at": "2025-08-01T09:30:00Z", "start": "2025-08-01T10:30:00Z", "end": "2026-09-01T10:30:00Z"},
        }},
        "warnings": ["You have built more workspaces with managed agents than your license allows. Further managed agent builds will be blocked."],
        "errors": [], "has_license": true, "trial": false, "require_telemetry": false, "refreshed_at": "2025-10-01T12:00:00Z",
    });
    assert_eq!(answer, expected);
    let none = serde_json::to_value(of_2025(&[], 0)).expect("JSON");
    assert_eq!(
        none["features"],
        json!({"managed_agent_limit": {"entitlement": "not_entitled", "enabled": false}})
    );
}

#[test]
fn the_newest_eligible_license_publishes() {
    let candidates = [
        (1, LicenseClaims { publish_usage_data: false, ..later(9, license(&[])) }),
        (2, LicenseClaims { account_type: "internal".to_owned(), ..later(9, license(&[])) }),
        (3, LicenseClaims { expires_at: now(), ..later(9, license(&[])) }),
        (4, LicenseClaims { not_before: now() + TimeDelta::days(1), ..later(9, license(&[])) }),
        (5, license(&[])),
        (6, later(2, license(&[]))),
        (7, later(2, premium(&[]))),
    ];
    let pick = |candidates: &[(i32, LicenseClaims)]| {
        pick_publishing_license(candidates.iter().map(|(id, claims)| (*id, claims)), now())
            .map(|(id, _)| id)
    };
    assert_eq!(pick(&candidates), Some(6), "of equals the first");
    assert_eq!(pick(&candidates[..4]), None);
    let grace =
        LicenseClaims { license_expires: at("2025-09-30T00:00:00Z"), ..later(1, license(&[])) };
    assert_eq!(pick(&[(5, license(&[])), (8, grace)]), Some(8), "grace still publishes");
}

#[test]
fn a_rule_set_is_known_by_name() {
    for rules in [RuleSet::Y2025M07, RuleSet::Y2026M02] {
        assert_eq!(rules.to_string().parse(), Ok(rules));
        assert_eq!(serde_json::to_value(rules).expect("JSON"), json!(rules.to_string()));
    }
    assert_eq!("2027-01".parse::<RuleSet>(), Err(UnknownRuleSet("2027-01".to_owned())));
}
