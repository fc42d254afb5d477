//! Rehearsals with other rules, and with licenses that are not installed.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tallyline::event::{Event, Payload, PublishMarks, Usage, UsageQuantity};
use tallyline::ledger::choices;
use tallyline_sim::coderd::Signer;

use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT};
use crate::support::process::run_tallyline;

use super::{SECRET, Site, json_of, record};

const AT: &str = "2025-08-01T12:00:00Z";

/// Entitlement, soft limit, limit, managed agents, and the numbers of warnings and errors.
fn row(granted: &Value) -> (String, Option<i64>, Option<i64>, Option<i64>, usize, usize) {
    let length = |name: &str| granted[name].as_array().unwrap_or_else(|| panic!("{granted}")).len();
    let number = |name: &str| granted[name].as_i64();
    let entitlement = granted["entitlement"].as_str().unwrap().to_owned();
    (
        entitlement,
        number("soft_limit"),
        number("limit"),
        number("agents"),
        length("warnings"),
        length("errors"),
    )
}

const ENTITLED: &str = "entitled";

/// The numbers come from coderd's rules of each era. In 2025-07 there are a soft and a hard limit,
/// and the warning starts at 75 % between them. The premium default is 800, and 1000 a user; a hard
/// limit below the soft one is an error. In 2026-02 the soft key is the only limit and the hard key
/// is ignored. The premium default is 1000, and the warning starts at the limit.
#[tokio::test]
async fn a_rule_rehearsal_shows_the_difference_between_two_rule_sets_and_touches_nothing() {
    let site = Site::new().await;
    let answer = json_of(
        &site.rehearse(&format!("rebuild plan licenses --rules 2026-02 --at {AT}"), 0).await,
    );
    assert_eq!(answer["differs"], true);
    let rehearsal = &answer["rehearsal"];
    assert_eq!(
        (&rehearsal["rules_now"], &rehearsal["rules_then"]),
        (&json!("2025-07"), &json!("2026-02"))
    );
    let deployment = &rehearsal["deployments"][0];
    assert_eq!(deployment["deployment"], json!(DEPLOYMENT));

    // now: license 1 wins over the default; 57 of 60 is near (above 40 + 0.75 × 20 = 55); license 3
    // is an error
    assert_eq!(row(&deployment["now"]), (ENTITLED.into(), Some(40), Some(60), Some(57), 1, 1));
    let warning = |granted: &Value| granted["warnings"][0].as_str().unwrap().to_owned();
    assert!(warning(&deployment["now"]).starts_with("You are approaching the managed agent limit"));
    assert!(deployment["now"]["errors"][0].as_str().unwrap().contains("token-3"), "{deployment}");
    // then: license 3 is valid, and issued last; 48 of 50
    assert_eq!(row(&deployment["then"]), (ENTITLED.into(), None, Some(50), Some(48), 0, 0));

    let window = |index: usize, when: &str| row(&deployment["windows"][index][when]);
    assert_eq!(window(0, "now"), (ENTITLED.into(), Some(40), Some(60), Some(57), 1, 0));
    assert_eq!(window(0, "then"), (ENTITLED.into(), None, Some(40), Some(57), 1, 0));
    assert!(
        warning(&deployment["windows"][0]["then"])
            .starts_with("You have built more workspaces with managed agents")
    );
    assert_eq!(window(1, "now"), (ENTITLED.into(), Some(8_000), Some(10_000), Some(80), 0, 0));
    assert_eq!(window(1, "then"), (ENTITLED.into(), None, Some(1_000), Some(80), 0, 0));
    assert_eq!(window(2, "now"), ("not_entitled".into(), None, None, Some(48), 0, 1));
    assert_eq!(window(2, "then"), (ENTITLED.into(), None, Some(50), Some(48), 0, 0));
    let edges = |index: usize| {
        [
            &deployment["windows"][index]["then"]["start"],
            &deployment["windows"][index]["then"]["end"],
        ]
    };
    assert_eq!(edges(0), [&json!("2025-07-10T09:30:00Z"), &json!("2026-08-10T00:00:00Z")]);
    assert_eq!(
        edges(1),
        [&json!("2025-07-01T00:00:00Z"), &json!("2125-07-01T00:00:00Z")],
        "the default's own"
    );

    let table = run_tallyline(
        &[
            "rebuild",
            "plan",
            "licenses",
            "--rules",
            "2026-02",
            "--at",
            AT,
            "--pipeline",
            &site.file,
        ],
        &[],
    )
    .await;
    for words in [
        "rules 2025-07 and 2026-02, at 2025-08-01T12:00:00Z",
        "now: warning: You are approaching",
        "10000",
        "not_entitled",
    ] {
        assert!(table.stdout.contains(words), "{words:?} is not in {}", table.stdout);
    }
}

#[tokio::test]
async fn rehearsed_rules_are_used_by_their_hash_only_and_with_an_act() {
    let site = Site::new().await;
    let words = format!("licenses --rules 2026-02 --at {AT}");
    let planned = json_of(&site.rehearse(&format!("rebuild plan {words}"), 0).await);
    let hash = planned["hash"].as_str().unwrap();
    let refused = site.rehearse(&format!("rebuild execute {words} --plan 00ff"), 4).await;
    assert!(refused.stderr.contains("the effect has changed since the plan"), "{refused:?}");
    for (words, exit, problem) in [
        ("licenses --rules 2027-01", 2, "rule set \"2027-01\" is unknown"),
        ("metrics --rules 2026-02", 2, "metrics have no rules"),
        (
            "licenses --rules 2026-02 --source 00000000-0000-0000-0000-0000000000ff",
            4,
            "has no deployment",
        ),
        (
            "licenses --source 00000000-0000-0000-0000-0000000000d1",
            2,
            "source: --source is only for a rehearsal",
        ),
        ("licenses --at 2025-08-01", 2, "at: --at is only for a rehearsal"),
        ("metrics --at 2025-08-01", 2, "at: --at is only for a rehearsal"),
    ] {
        let ended = site.rehearse(&format!("rebuild plan {words}"), exit).await;
        assert!(ended.stderr.contains(problem), "{ended:?}");
    }
    // usage that changes no limit and no warning does not change the plan
    let event = |id: &str, count| {
        let (quantity, created_at) =
            (UsageQuantity::ManagedAgents(count), "2025-07-26T00:00:00Z".parse().unwrap());
        Event {
            deployment: DEPLOYMENT,
            payload: Payload::Usage(Usage {
                id: id.into(),
                quantity,
                created_at,
                marks: PublishMarks::default(),
            }),
        }
    };
    record(&site.ledger, &[event("one more", 1)]).await;
    let again = json_of(&site.rehearse(&format!("rebuild plan {words}"), 0).await);
    assert_eq!(
        (again["hash"].as_str().unwrap(), row(&again["rehearsal"]["deployments"][0]["then"]).3),
        (hash, Some(49))
    );
    // usage that takes license 3 to its limit changes the effect
    record(&site.ledger, &[event("and one", 1)]).await;
    site.rehearse(&format!("rebuild execute {words} --plan {hash}"), 4).await;

    let planned = json_of(&site.rehearse(&format!("rebuild plan {words}"), 0).await);
    // the command as printed, without the program's name
    let command: Vec<&str> = planned["execute"]
        .as_str()
        .unwrap()
        .split(' ')
        .skip(1)
        .chain(["--as", "sre-1", "--reason", "renewal"])
        .collect();
    let executed = run_tallyline(&command, &[]).await;
    assert!(executed.status.success() && executed.stdout.contains("2026-02"), "{executed:?}");
    assert_eq!(
        site.ledger
            .run(async |conn| choices::get(conn, "license.rules").await)
            .await
            .unwrap()
            .as_deref(),
        Some("2026-02")
    );
    let act: (String, String, String, Value) = sqlx::query_as(
        "select actor, subject, reason, detail from operator_act where act = 'rebuild'",
    )
    .fetch_one(&site.ledger.pool)
    .await
    .unwrap();
    assert_eq!(
        (act.0.as_str(), act.1.as_str(), act.2.as_str()),
        ("sre-1", "license.rules", "renewal")
    );
    assert_eq!((&act.3["from"], &act.3["to"]), (&json!("2025-07"), &json!("2026-02")));
    // from now on other rules are compared with these, and the way back is the same
    let back = json_of(
        &site.rehearse(&format!("rebuild plan licenses --rules 2025-07 --at {AT}"), 0).await,
    );
    assert_eq!(
        row(&back["rehearsal"]["deployments"][0]["now"]),
        (ENTITLED.into(), None, Some(50), Some(50), 1, 0)
    );
}

/// A token of the key `kid`, signed with that secret.
fn token(kid: &str, secret: [u8; 32], claims: &Value) -> String {
    Signer::new(secret, kid).and_then(|signer| signer.sign(claims)).unwrap()
}

/// Valid from 2025-09-01 for a year, with limits of 1000 and 2000.
fn candidate(deployment_ids: &Value) -> Value {
    let seconds = |text: &str| text.parse::<DateTime<Utc>>().unwrap().timestamp();
    json!({
        "iss": "test", "jti": "token-9", "iat": seconds("2025-07-25T00:00:00Z"), "nbf": seconds("2025-09-01T00:00:00Z"),
        "license_expires": seconds("2026-09-01T00:00:00Z"), "exp": seconds("2026-10-01T00:00:00Z"), "version": 3, "account_type": "salesforce",
        "account_id": "1", "deployment_ids": deployment_ids, "feature_set": "enterprise",
        "features": {"managed_agent_limit_soft": 1000, "managed_agent_limit_hard": 2000}
    })
}

#[tokio::test]
async fn a_candidate_license_is_rehearsed_before_it_is_installed() {
    let site = Site::new().await;
    let file =
        site.file("new.jwt", &(token("k1", SECRET, &candidate(&json!([DEPLOYMENT]))) + "\n"));
    let answer = json_of(
        &site.rehearse(&format!("rebuild plan licenses --license {file} --at {AT}"), 0).await,
    );
    assert_eq!(
        (&answer["hash"], &answer["execute"], &answer["rehearsal"]["notes"]),
        (&Value::Null, &Value::Null, &json!([]))
    );
    let deployment = &answer["rehearsal"]["deployments"][0];
    assert_eq!(deployment["now"], deployment["then"], "it begins later");
    let window = &deployment["windows"][3];
    assert_eq!(
        (&window["license_id"], &window["candidate"], &window["validity"]),
        (&json!(4), &json!(true), &json!("not_yet_valid"))
    );
    assert_eq!(
        (&window["now"], row(&window["then"])),
        (&Value::Null, (ENTITLED.into(), Some(1_000), Some(2_000), Some(0), 0, 0))
    );

    let later = json_of(
        &site
            .rehearse(
                &format!(
                    "rebuild plan licenses --license {file} --without 3 --at 2025-09-01T00:00:00Z"
                ),
                0,
            )
            .await,
    );
    let deployment = &later["rehearsal"]["deployments"][0];
    // license 1 as before, and the refused 3; then the one issued last, without usage in its window
    // yet
    assert_eq!(row(&deployment["now"]), (ENTITLED.into(), Some(40), Some(60), Some(57), 1, 1));
    assert_eq!(
        row(&deployment["then"]),
        (ENTITLED.into(), Some(1_000), Some(2_000), Some(0), 0, 0)
    );
    assert_eq!(
        (&deployment["windows"][2]["then"], &deployment["windows"][3]["validity"]),
        (&Value::Null, &json!("valid"))
    );

    let foreign =
        site.file("foreign.jwt", &token("k1", SECRET, &candidate(&json!([OTHER_DEPLOYMENT]))));
    let answer =
        json_of(&site.rehearse(&format!("rebuild plan licenses --license {foreign}"), 0).await);
    assert!(
        answer["rehearsal"]["notes"][0].as_str().unwrap().contains("coderd will refuse it"),
        "{answer}"
    );
    let table = run_tallyline(
        &["rebuild", "plan", "licenses", "--license", &file, "--pipeline", &site.file],
        &[],
    )
    .await;
    assert!(
        table.stdout.contains("4 (candidate)") && table.stdout.contains("nothing to execute"),
        "{table:?}"
    );
}

#[tokio::test]
async fn an_invalid_candidate_is_refused_with_the_reason_and_never_shown() {
    let site = Site::new().await;
    let good = candidate(&json!([]));
    let mut old = good.clone();
    old["version"] = json!(2);
    for (name, text, problem) in [
        ("tampered", token("k1", [8; 32], &good), "the signature does not match the key \"k1\""),
        ("unknown", token("k2", SECRET, &good), "names the key \"k2\", which is not configured"),
        ("version", token("k1", SECRET, &old), "claim version is 2"),
        ("text", "no token".to_owned(), "not three parts"),
    ] {
        let file = site.file(name, &text);
        let ended = site.rehearse(&format!("rebuild plan licenses --license {file}"), 2).await;
        assert!(
            ended.stderr.contains(problem) && !ended.stderr.contains(&text),
            "{name}: {ended:?}"
        );
    }
    let missing = site.rehearse("rebuild plan licenses --license no/such/file", 2).await;
    assert!(missing.stderr.contains("no/such/file"), "{missing:?}");
    let unknown = site.rehearse("rebuild plan licenses --without 9", 2).await;
    assert!(unknown.stderr.contains("no license with id 9"), "{unknown:?}");
}
