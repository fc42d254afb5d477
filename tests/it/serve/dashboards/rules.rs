//! The shipped alert rules.

use std::process::Command;
use std::time::Duration;

use ::prometheus::{IntGauge, Registry};
use tallyline::audit::AuditTelemetry;
use tallyline::consumer::ConsumerTelemetry;
use tallyline::publisher::PublisherTelemetry;

use super::grafana::{list, text};
use crate::support::prometheus::Prometheus;
use crate::support::{eventually, setting};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/dashboards/prometheus");

fn rules() -> String {
    std::fs::read_to_string(format!("{FOLDER}/rules.yml")).unwrap()
}

/// The names in a text that start with `begin`.
fn names(text: &str, begin: &str) -> Vec<String> {
    let end = |rest: &str| {
        rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len())
    };
    text.match_indices(begin).map(|(at, _)| text[at..at + end(&text[at..])].to_owned()).collect()
}

#[test]
fn promtool_accepts_the_rules_and_their_tests() {
    for arguments in [["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]] {
        let run = Command::new(setting("TALLYLINE_TEST_PROMTOOL"))
            .args(arguments)
            .current_dir(FOLDER)
            .output()
            .unwrap();
        assert!(run.status.success(), "{arguments:?}: {run:?}");
    }
    // The tests make each rule fire.
    let tests = std::fs::read_to_string(format!("{FOLDER}/rules_test.yml")).unwrap();
    let alerts: Vec<_> = rules()
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: ").map(str::to_owned))
        .collect();
    assert!(alerts.len() >= 5, "{alerts:?}");
    for alert in alerts {
        assert!(
            tests.contains(&format!("alertname: {alert}"))
                || tests.contains(&format!("alertname=\"{alert}\"")),
            "{alert} is not tested"
        );
    }
}

#[test]
fn rules_name_only_existing_series() {
    let registry = Registry::new();
    ConsumerTelemetry::register(&registry).unwrap();
    PublisherTelemetry::register(&registry).unwrap();
    AuditTelemetry::register(&registry, true).unwrap();
    let registered = |name: &str| {
        let again =
            registry.register(Box::new(IntGauge::new(name, "One more of that name.").unwrap()));
        matches!(again, Err(::prometheus::Error::AlreadyReg))
    };
    assert!(!registered("tallyline_publisher_no_such_series"));
    let named: Vec<_> = ["tallyline_audit_", "tallyline_consumer_", "tallyline_publisher_"]
        .iter()
        .flat_map(|begin| names(&rules(), begin))
        .collect();
    assert!(named.len() >= 8, "{named:?}");
    for name in named {
        assert!(registered(&name), "{name}");
    }
}

/// Checks that a server with one healthy target has evaluated each rule. One rule waits for a
/// stopped clock, like its ledger's; none fires.
pub(super) async fn are_loaded_and_evaluated(server: &Prometheus) {
    eventually(Duration::from_secs(60), "each rule is evaluated", || async {
        let data = server.get("/api/v1/rules", &[]).await;
        let rules: Vec<_> = list(&data["groups"]).flat_map(|group| list(&group["rules"])).collect();
        !rules.is_empty() && rules.iter().all(|rule| rule["health"] != "unknown")
    })
    .await;
    let data = server.get("/api/v1/rules", &[]).await;
    for rule in list(&data["groups"]).flat_map(|group| list(&group["rules"])) {
        let expected =
            if rule["name"] == "TallylineSourceNotComplete" { "pending" } else { "inactive" };
        assert_eq!((text(&rule["health"]), text(&rule["state"])), ("ok", expected), "{rule}");
    }
    // Series of every process.
    let series: Vec<_> =
        ["tallyline_build_", "tallyline_metrics_", "tallyline_complete_", "tallyline_rejects_"]
            .iter()
            .flat_map(|begin| names(&rules(), begin))
            .collect();
    assert!(series.len() >= 5, "{series:?}");
    for name in series {
        assert_eq!(server.query(&format!("count({name}) > 0")).await.len(), 1, "{name}");
    }
}
