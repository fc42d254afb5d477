//! The raw samples of a Prometheus that scrapes all the time, compared with the truth at both ends.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use crate::journey::expected::{Key, Numbers, Value};
use crate::support::prometheus::{Generation, Prometheus};

/// The counters and the counts of both histograms.
const SERIES: [&str; 3] = [
    "coderd_workspace_creation_total",
    "coderd_workspace_creation_duration_seconds_count",
    "coderd_prebuilt_workspace_claim_duration_seconds_count",
];

/// A server that scrapes both addresses each second, as the shipped configuration does.
pub async fn server(metrics: [&str; 2]) -> Prometheus {
    let shipped = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/dashboards/prometheus/prometheus.yml"
    ))
    .expect("shipped");
    let targets = metrics
        .map(|url| format!("{:?}", url.trim_start_matches("http://").trim_end_matches("/metrics")))
        .join(", ");
    let configuration = shipped
        .replace("\"127.0.0.1:2112\"", &targets)
        .replace("scrape_interval: 15s", "scrape_interval: 1s");
    assert!(
        configuration.contains("interval: 1s") && !configuration.contains("127.0.0.1:2112"),
        "{configuration}"
    );
    Prometheus::start(Generation::Three, &configuration).await
}

/// The value of each series in these numbers.
pub fn values(numbers: &Numbers) -> BTreeMap<Key, f64> {
    let value = |(family, labels): Key, value: Value| match value {
        Value::Counter(count) => ((family, labels), count),
        Value::Histogram { count, .. } => ((format!("{family}_count"), labels), count as f64),
    };
    let all = numbers.series().into_iter().map(|(key, current)| value(key, current));
    all.filter(|((family, _), _)| SERIES.contains(&family.as_str())).collect()
}

/// Whether each series has this newest sample.
pub async fn has(server: &Prometheus, values: &BTreeMap<Key, f64>) -> bool {
    let raw = raw(server).await;
    values.iter().all(|(key, value)| raw.get(key).and_then(|samples| samples.last()) == Some(value))
}

/// All raw samples, by series.
pub async fn raw(server: &Prometheus) -> BTreeMap<Key, Vec<f64>> {
    let mut all = BTreeMap::new();
    for name in SERIES {
        let data = server.get("/api/v1/query", &[("query", &format!("{name}[1d]"))]).await;
        for series in data["result"].as_array().expect("a matrix") {
            let labels = series["metric"].as_object().expect("labels").iter();
            let labels = labels
                .filter(|(name, _)| !["__name__", "instance", "job"].contains(&name.as_str()));
            let mut labels: Vec<(String, String)> = labels
                .map(|(name, value)| (name.clone(), value.as_str().expect("text").to_owned()))
                .collect();
            // Prometheus drops empty labels
            if !labels.iter().any(|(name, _)| name == "preset_name") {
                labels.push(("preset_name".to_owned(), String::new()));
            }
            labels.sort();
            let number = |sample: &Json| {
                sample[1].as_str().expect("a number").parse::<f64>().expect("a number")
            };
            let samples: Vec<f64> =
                series["values"].as_array().expect("samples").iter().map(number).collect();
            assert!(
                all.insert((name.to_owned(), labels), samples).is_none(),
                "a series under two instances"
            );
        }
    }
    all
}

/// Checks that no series fell or was reset, and that each grew by the difference of the numbers.
pub async fn nothing_fell(
    server: &Prometheus,
    first: &BTreeMap<Key, f64>,
    last: &BTreeMap<Key, f64>,
) {
    let raw = raw(server).await;
    for (key, value) in last {
        let samples = raw.get(key).unwrap_or_else(|| panic!("{key:?} was never scraped"));
        assert!(samples.is_sorted(), "{key:?} fell: {samples:?}");
        assert_eq!(samples.last(), Some(value), "{key:?} at last");
        if let Some(begun) = first.get(key) {
            assert_eq!(
                samples.last().unwrap() - samples[0],
                value - begun,
                "{key:?}: last minus first"
            );
        }
    }
    assert!(raw.keys().all(|key| last.contains_key(key)), "a series that is not true");
    assert!(
        first.len() > 10 && first.iter().any(|(key, value)| last[key] > *value),
        "something was counted meanwhile"
    );
    for family in [
        "coderd_workspace_creation_total",
        "coderd_workspace_creation_duration_seconds",
        "coderd_prebuilt_workspace_claim_duration_seconds",
    ] {
        for name in [
            family.to_owned(),
            format!("{family}_count"),
            format!("{family}_bucket"),
            format!("{family}_sum"),
        ] {
            assert_eq!(
                server.query(&format!("resets({name}[1d]) > 0")).await,
                [],
                "{name} was reset"
            );
        }
    }
}
