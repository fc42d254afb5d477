//! The answers to coderd, compared with numbers computed by hand.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::{LicenseChange, LicenseState, Sequence, Source, licenses, snapshots};
use tallyline::license::RuleSet;

use super::{Process, SOON, Site};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, build, choose_license_rules, noon};

/// The clock is at noon of 2025-08-01; the license's edges are within a day.
const START: &str = "2025-07-10T09:30:00Z";
const END: &str = "2025-09-10T17:45:30.5Z";

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn agents(id: &str, count: u64, created_at: DateTime<Utc>) -> Event {
    let usage = Usage {
        id: id.into(),
        quantity: UsageQuantity::ManagedAgents(count),
        created_at,
        marks: PublishMarks::default(),
    };
    Event { deployment: DEPLOYMENT, payload: Payload::Usage(usage) }
}

/// Usage around both edges, each with a count that no sum of others equals.
fn usage() -> Vec<Event> {
    let micro = TimeDelta::microseconds(1);
    let seats = Usage {
        id: "seats".into(),
        quantity: UsageQuantity::AiSeats(4096),
        created_at: noon(),
        marks: PublishMarks::default(),
    };
    vec![
        agents("the day before", 1, at("2025-07-09T23:59:59.999999Z")),
        agents("that day, before", 2, at("2025-07-10T00:00:00Z")),
        agents("just before", 4, at(START) - micro),
        agents("at the start", 8, at(START)),
        agents("within", 16, noon()),
        agents("just before the end", 32, at(END) - micro),
        agents("at the end", 64, at(END)),
        agents("that day, after", 128, at("2025-09-10T23:59:59.999999Z")),
        agents("the day after", 256, at("2025-09-11T00:00:00Z")),
        Event { deployment: DEPLOYMENT, payload: Payload::Usage(seats) },
    ]
}

async fn license(site: &Site, source: &Source, features: Value) {
    let claims = json!({
        "issued_at": "2025-07-01T00:00:00Z", "not_before": START, "license_expires": "2025-08-31T00:00:00Z", "expires_at": END,
        "account_type": "salesforce", "account_id": "1", "feature_set": "enterprise", "features": features
    });
    let change = LicenseChange {
        license_id: 1,
        jwt_sha256: [7; 32],
        uploaded_at: None,
        state: LicenseState::Verified(claims),
    };
    let (lease, now) = (site.lease(source).await, site.ledger.clock.now());
    site.ledger
        .run(async |conn| licenses::record(conn, &lease, source.id, &[change], now).await)
        .await
        .unwrap();
}

/// Waits until the answers contain everything recorded.
async fn caught_up(site: &Site, process: &Process) {
    let end = site.ledger.run(snapshots::head).await.unwrap();
    eventually(SOON, "the licenses are folded", || async {
        let (status, body) = process
            .get("/api/v1/managed-agents/count?start=2025-01-01T00:00:00Z&end=2025-01-01T00:00:00Z")
            .await;
        let there =
            body["sequence"].as_str().and_then(|sequence| sequence.parse::<Sequence>().ok());
        status == 200 && there.is_some_and(|there| there.number >= end.number)
    })
    .await;
    // the license rules are known, too
    eventually(SOON, "entitlements are answered", || async {
        process.get("/api/v2/entitlements").await.0 == 200
    })
    .await;
}

#[tokio::test]
async fn entitlements_are_coderds_shape_with_the_exact_count_of_the_license_s_window() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::AgentUsage, usage()).await;
    license(
        &site,
        &source,
        json!({"managed_agent_limit_soft": 40, "managed_agent_limit_hard": 60}),
    )
    .await;
    site.pass(&source, 0).await;
    let process = site.process().await;
    caught_up(&site, &process).await;
    eventually(SOON, "how far the source is complete is known", || async {
        let answer = reqwest::get(format!("{}/api/v2/entitlements", process.api)).await.unwrap();
        answer.headers().contains_key("tallyline-complete-until")
    })
    .await;

    let answer = reqwest::get(format!("{}/api/v2/entitlements", process.api)).await.unwrap();
    let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("tallyline-as-of"), "2025-08-01T12:00:00Z");
    assert_eq!(header("tallyline-complete-until"), "2025-08-01T12:00:00Z");
    assert_eq!(
        header("tallyline-sequence"),
        site.ledger.run(snapshots::head).await.unwrap().to_string()
    );
    let body: Value = answer.json().await.unwrap();
    // 8 + 16 + 32: usage at the start is in, at the end it is out. Of 60, 56 is near the limit:
    // above 40 + 0.75 × 20 = 55.
    let warnings = body["warnings"].as_array().cloned();
    assert_eq!(warnings.as_ref().map(Vec::len), Some(1), "{body}");
    assert_eq!(
        body,
        json!({
            "features": {
                "managed_agent_limit": {
                    "entitlement": "entitled",
                    "enabled": true,
                    "limit": 60,
                    "soft_limit": 40,
                    "actual": 56,
                    "usage_period": {"issued_at": "2025-07-01T00:00:00Z", "start": START, "end": "2025-09-10T17:45:30.500Z"}
                }
            },
            "warnings": warnings,
            "errors": [],
            "has_license": true,
            "trial": false,
            "require_telemetry": false,
            "refreshed_at": "2025-08-01T12:00:00Z"
        })
    );
}

#[tokio::test]
async fn entitlements_follow_the_clock_the_licenses_and_the_configured_rules() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    let process = site.process().await;
    let newer = site.process_with(|_, api| api.operations.rules = RuleSet::Y2026M02).await;
    caught_up(&site, &process).await;
    let feature = |body: &Value| body["features"]["managed_agent_limit"].clone();
    let (_, unlicensed) = process.get("/api/v2/entitlements").await;
    assert_eq!(feature(&unlicensed), json!({"entitlement": "not_entitled", "enabled": false}));
    assert_eq!(unlicensed["has_license"], json!(false));

    site.record(Topic::AgentUsage, usage()).await;
    license(
        &site,
        &source,
        json!({"managed_agent_limit_soft": 40, "managed_agent_limit_hard": 60}),
    )
    .await;
    caught_up(&site, &process).await;
    caught_up(&site, &newer).await;
    // Under the later rules the soft key is the only limit.
    let (_, later) = newer.get("/api/v2/entitlements").await;
    assert_eq!((&feature(&later)["limit"], feature(&later).get("soft_limit")), (&json!(40), None));
    for (now, entitlement) in [
        (at(START) - TimeDelta::microseconds(1), "not_entitled"),
        (at(START), "entitled"),
        (at("2025-08-31T00:00:00Z"), "entitled"),
        (at("2025-08-31T00:00:00.000001Z"), "grace_period"),
        (at(END) - TimeDelta::microseconds(1), "grace_period"),
        (at(END), "not_entitled"),
    ] {
        site.ledger.clock.set(now);
        let (status, body) = process.get("/api/v2/entitlements").await;
        assert_eq!(
            (status.as_u16(), &feature(&body)["entitlement"]),
            (200, &json!(entitlement)),
            "at {now}: {body}"
        );
        let actual = feature(&body)["actual"].as_i64();
        assert_eq!(actual, (entitlement != "not_entitled").then_some(56), "at {now}");
    }
}

#[tokio::test]
async fn license_rules_that_an_operator_chose_hold_without_a_restart_and_over_the_pipelines() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::AgentUsage, usage()).await;
    license(
        &site,
        &source,
        json!({"managed_agent_limit_soft": 40, "managed_agent_limit_hard": 60}),
    )
    .await;
    let process = site.process().await;
    caught_up(&site, &process).await;
    let limits = async |process: &Process| {
        let (_, body) = process.get("/api/v2/entitlements").await;
        let feature = &body["features"]["managed_agent_limit"];
        (feature["limit"].as_i64(), feature["soft_limit"].as_i64())
    };
    assert_eq!(limits(&process).await, (Some(60), Some(40)));
    choose_license_rules(&site.ledger, "2026-02").await;
    eventually(SOON, "the chosen rules hold", || async {
        limits(&process).await == (Some(40), None)
    })
    .await;
    // a process that starts now never answers by the pipeline's rules
    let later = site.process().await;
    caught_up(&site, &later).await;
    assert_eq!(limits(&later).await, (Some(40), None));
    // rules of a later version: no answer by other rules, and everything else goes on
    choose_license_rules(&site.ledger, "2031-01").await;
    eventually(SOON, "no entitlements are answered", || async {
        later.get("/api/v2/entitlements").await.0 == 503
    })
    .await;
    let (status, _) = later
        .get("/api/v1/managed-agents/count?start=2025-01-01T00:00:00Z&end=2025-01-01T00:00:00Z")
        .await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn agents_are_counted_half_open_or_in_coderds_whole_days() {
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    site.record(Topic::AgentUsage, usage()).await;
    let process = site.process().await;
    caught_up(&site, &process).await;
    for (start, end, days, count) in [
        (START, END, "", 56),
        ("2025-07-10T09:30:00.000001Z", "2025-09-10T17:45:30.500001Z", "", 16 + 32 + 64),
        // The same instant with an offset, and one finer than a microsecond.
        ("2025-07-10T11:30:00%2B02:00", END, "", 56),
        ("2025-07-10T09:30:00.0000001Z", END, "", 48),
        (START, START, "", 0),
        ("1970-01-01T00:00:00Z", "9999-01-01T00:00:00Z", "", 511),
        // Both days whole: 2 + 4 + 8 + 16 + 32 + 64 + 128.
        (START, END, "&days=whole", 254),
    ] {
        let (status, body) = process
            .get(&format!("/api/v1/managed-agents/count?start={start}&end={end}{days}"))
            .await;
        assert_eq!(
            (status.as_u16(), &body["count"]),
            (200, &json!(count)),
            "{start} {end} {days}: {body}"
        );
    }
    let (_, body) =
        process.get(&format!("/api/v1/managed-agents/count?start={START}&end={END}")).await;
    let sequence = site.ledger.run(snapshots::head).await.unwrap();
    assert_eq!(
        body,
        json!({
            "count": 56, "start": START, "end": "2025-09-10T17:45:30.500Z", "as_of": "2025-08-01T12:00:00Z", "sequence": sequence,
            "complete_until": null, "source": DEPLOYMENT
        })
    );
}

#[tokio::test]
async fn a_wrong_query_gets_the_reason() {
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    let process = site.process().await;
    caught_up(&site, &process).await;
    let count = |query: &str| format!("/api/v1/managed-agents/count?{query}");
    for (query, field) in [
        ("", "start"),
        ("start=2025-07-01T00:00:00Z", "end"),
        ("start=yesterday&end=2025-07-01T00:00:00Z", "start"),
        ("start=-9000-01-01T00:00:00Z&end=2025-07-01T00:00:00Z", "start"),
        ("start=2025-07-01T00:00:00Z&end=%2B12000-01-01T00:00:00Z", "end"),
        ("start=2025-07-02T00:00:00Z&end=2025-07-01T23:59:59.999999Z", "end"),
        ("start=2025-07-01T00:00:00Z&end=2025-07-02T00:00:00Z&days=half", "days"),
        ("start=2025-07-01T00:00:00Z&end=2025-07-02T00:00:00Z&source=x", "source"),
        ("start=2025-07-01T00:00:00Z&end=2025-07-02T00:00:00Z&until=x", "until"),
    ] {
        let (status, problem) = process.get(&count(query)).await;
        assert_eq!(
            (status.as_u16(), problem["field"].as_str()),
            (400, Some(field)),
            "{query}: {problem}"
        );
        assert!(problem["message"].is_string());
    }
    for path in [
        "/api/v2/entitlements?source=00000000-0000-0000-0000-00000000d3d3",
        "/nowhere",
        "/metrics",
        "/api/v1/",
    ] {
        let (status, problem) = process.get(path).await;
        assert_eq!(
            (status.as_u16(), problem["message"].is_string()),
            (404, true),
            "{path}: {problem}"
        );
    }
    let posted = reqwest::Client::new()
        .post(format!("{}/api/v2/entitlements", process.api))
        .send()
        .await
        .unwrap();
    assert_eq!(posted.status(), 405);
    assert!(posted.json::<Value>().await.unwrap()["message"].is_string());

    // With two deployments in use, the request must name one.
    site.record(Topic::WorkspaceBuilds, vec![build(OTHER_DEPLOYMENT, 1)]).await;
    let other = format!("/api/v2/entitlements?source={OTHER_DEPLOYMENT}");
    eventually(SOON, "both are known", || async { process.get(&other).await.0 == 200 }).await;
    eventually(SOON, "neither is meant", || async {
        process.get("/api/v2/entitlements").await.0 == 400
    })
    .await;
}

#[tokio::test]
async fn status_shows_positions_sources_and_publications() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::AgentUsage, usage()).await;
    site.pass(&source, 0).await;
    site.log.append(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 1).to_message()]).await.unwrap();
    let process = site.process().await;
    caught_up(&site, &process).await;
    let (status, body) = process.get("/api/v1/status").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["ledger_sequence"], body["folded_sequences"]["licenses"]);
    assert_eq!((&body["at"], &body["log_problem"]), (&json!("2025-08-01T12:00:00Z"), &Value::Null));
    let lag = |topic: Topic| {
        body["partitions"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["topic"] == topic.name())
            .unwrap()["lag"]
            .clone()
    };
    assert_eq!((lag(Topic::AgentUsage), lag(Topic::WorkspaceBuilds)), (json!(0), json!(1)));
    let source = &body["sources"][0];
    assert_eq!(
        (&source["backfilled"], &source["complete_until"]),
        (&json!(true), &json!("2025-08-01T12:00:00Z"))
    );
    let pending: i64 = body["publications"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["state"] == "pending")
        .filter_map(|row| row["events"].as_i64())
        .sum();
    assert_eq!(pending, 10, "{body}");
}
