//! The shipped dashboard and alert rules, on a real Prometheus that scrapes a process with known
//! observations.

mod grafana;
mod observed;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::Value;
use tallyline::event::Topic;

use self::grafana::{Chosen, Dashboard, list, text, used};
use self::observed::{KINDS, Kind, Names, Observed};
use super::{Process, Site};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, noon};
use crate::support::prometheus::{Generation, Prometheus};

/// The ratio of a native bucket's bounds in schema 3: 2^(1/8).
const WIDTH: f64 = 1.0905;
const WITHIN: Duration = Duration::from_secs(60);
const LABELS: [&str; 3] = ["organization_name", "template_name", "preset_name"];

fn dashboard() -> Dashboard {
    Dashboard::shipped("workspace-creation-and-claims.json")
}

#[test]
fn the_dashboard_is_whole() {
    let dashboard = dashboard();
    assert_eq!(dashboard.0["title"], "Workspace creation and claims");
    assert!(dashboard.0["schemaVersion"].as_i64().unwrap() >= 39 && dashboard.0["id"].is_null());
    let source = serde_json::json!({ "type": "prometheus", "uid": "${datasource}" });
    let variables = dashboard.variables();
    assert_eq!(variables["datasource"]["type"], "datasource");

    let (mut ids, mut titles) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard.panels() {
        let title = text(&panel["title"]);
        assert!(
            ids.insert(panel["id"].as_i64().unwrap()) && titles.insert(title),
            "{title} has an id and a title of its own"
        );
        if panel["type"] == "row" {
            continue;
        }
        assert!(text(&panel["description"]).len() > 40 && panel["datasource"] == source, "{title}");
        assert!(!text(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "{title} has a unit");
        let references: BTreeSet<_> =
            list(&panel["targets"]).map(|target| text(&target["refId"])).collect();
        assert!(
            !references.is_empty() && references.len() == list(&panel["targets"]).count(),
            "{title}: queries have references"
        );
        for target in list(&panel["targets"]) {
            assert!(!text(&target["expr"]).is_empty() && target["datasource"] == source, "{title}");
        }
        // A panel may only be repeated by a variable with several values.
        assert!(
            panel["repeat"].as_str().is_none_or(|by| variables[by]["multi"] == true),
            "{title}"
        );
    }
    do_not_overlap(&dashboard);

    // Everywhere in the file, including titles and variables.
    let built_in = ["__range", "__interval", "__rate_interval", "__all"];
    let uses = used(&dashboard.0.to_string());
    for name in &uses {
        assert!(
            variables.contains_key(&name[..]) || built_in.contains(&&name[..]),
            "{name} is not defined"
        );
    }
    for name in variables.keys() {
        assert!(uses.contains(*name), "{name} is used nowhere");
    }
}

fn do_not_overlap(dashboard: &Dashboard) {
    let mut cells = BTreeSet::new();
    for panel in dashboard.panels() {
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_i64().unwrap());
        assert!(x >= 0 && w > 0 && h > 0 && x + w <= 24, "{panel}");
        for cell in (x..x + w).flat_map(|column| (y..y + h).map(move |line| (column, line))) {
            assert!(cells.insert(cell), "{} lies over another panel", panel["title"]);
        }
    }
}

/// The shipped configuration with this target, scraping once a second, and the shipped rules.
/// Nothing else is changed.
fn configuration(process: &Process) -> String {
    let folder = format!("{}/dashboards/prometheus", env!("CARGO_MANIFEST_DIR"));
    let mut text = std::fs::read_to_string(format!("{folder}/prometheus.yml")).unwrap();
    let target = process.metrics.trim_start_matches("http://");
    let rules = format!("{folder}/rules.yml");
    for (shipped, here) in [
        ("127.0.0.1:2112", target),
        ("scrape_interval: 15s", "scrape_interval: 1s\n  evaluation_interval: 1s"),
        ("- rules.yml", &format!("- {rules}")),
    ] {
        assert!(text.contains(shipped), "{shipped}");
        text = text.replace(shipped, here);
    }
    text
}

/// A Prometheus that has scraped a process before and after the observations of
/// [`Observed::after`], just now.
struct Scraped {
    server: Prometheus,
    /// The time after the last scrape, in seconds.
    now: f64,
    process: Process,
    _site: Site,
}

impl Scraped {
    async fn new() -> Scraped {
        let site = Site::new().await;
        let source = site.collected(DEPLOYMENT).await;
        let (before, after) = (Observed::before(), Observed::after());
        site.record(Topic::WorkspaceBuilds, before.builds(1)).await;
        site.record(Topic::PrebuildClaims, before.claims(1)).await;
        site.pass(&source, 0).await;
        let process = site.process().await;
        process.shows("").await;
        let server = Prometheus::start(Generation::Three, &configuration(&process)).await;
        eventually(WITHIN, "scraped before the moment", || async {
            server
                .query("min(count_over_time(coderd_workspace_creation_total[5m])) >= 3")
                .await
                .len()
                == 1
        })
        .await;
        site.record(Topic::WorkspaceBuilds, after.builds(1001)).await;
        site.record(Topic::PrebuildClaims, after.claims(1001)).await;
        let all = |kind| before.count(kind, |_| true) + after.count(kind, |_| true);
        let there = [
            ("sum(coderd_workspace_creation_total)", all(Kind::Regular)),
            (
                "sum(histogram_count(coderd_workspace_creation_duration_seconds{type=\"prebuild\"}))",
                all(Kind::Prebuild),
            ),
            (
                "sum(histogram_count(coderd_prebuilt_workspace_claim_duration_seconds))",
                all(Kind::Claim),
            ),
        ];
        for (query, count) in there {
            eventually(WITHIN, "scraped after the moment", || async {
                server.query(query).await == [(BTreeMap::new(), count)]
            })
            .await;
        }
        let now = server.query("time()").await[0].1;
        Scraped { server, now, process, _site: site }
    }

    /// One evaluation, at the time after the last scrape.
    async fn at(&self, expr: &str) -> Vec<Value> {
        let now = self.now.to_string();
        let mut data = self.server.get("/api/v1/query", &[("query", expr), ("time", &now)]).await;
        list(&data["result"].take()).cloned().collect()
    }

    /// One evaluation a second, for ten minutes.
    async fn drawn(&self, expr: &str) -> Vec<Value> {
        let (start, end) = ((self.now - 600.0).to_string(), self.now.to_string());
        let parameters = [("query", expr), ("start", &start[..]), ("end", &end[..]), ("step", "1")];
        let mut data = self.server.get("/api/v1/query_range", &parameters).await;
        list(&data["result"].take()).cloned().collect()
    }

    /// Numbers by labels.
    async fn numbers(&self, expr: &str) -> Vec<(BTreeMap<String, String>, f64)> {
        let one = |sample: Value| {
            let labels = serde_json::from_value(sample["metric"].clone()).unwrap();
            (
                labels,
                text(&sample["value"][1]).parse().unwrap_or_else(|_| panic!("{expr}: {sample}")),
            )
        };
        self.at(expr).await.into_iter().map(one).collect()
    }

    async fn number(&self, expr: &str) -> f64 {
        let numbers = self.numbers(expr).await;
        let [(_, number)] = &numbers[..] else { panic!("{expr}: not one number: {numbers:?}") };
        *number
    }
}

/// All values, and the window of an hour.
fn all() -> BTreeMap<&'static str, Chosen> {
    let one = |value: &str| Chosen::One(value.to_owned());
    let names = ["organization", "template", "preset"].map(|name| (name, Chosen::All));
    names
        .into_iter()
        .chain([("job", one("tallyline")), ("window", one("1h")), ("quantile", one("0.9"))])
        .collect()
}

#[tokio::test]
async fn every_query_of_the_dashboard_returns_data_and_the_right_numbers() {
    let (scraped, dashboard) = (Scraped::new().await, dashboard());
    all_bring_data(&scraped, &dashboard).await;
    counts_are_exact(&scraped, &dashboard).await;
    chosen_names_are_taken_literally(&scraped, &dashboard).await;
    quantiles_are_near(&scraped, &dashboard).await;
    variables_offer_the_names(&scraped, &dashboard).await;
    freshness_is_shown(&scraped, &dashboard).await;
    rules::are_loaded_and_evaluated(&scraped.server).await;
    scraped.process.end().await;
}

async fn all_bring_data(scraped: &Scraped, dashboard: &Dashboard) {
    let defaults: Vec<_> =
        ["window", "quantile"].map(|name| (name, dashboard.offered(name))).into();
    for target in dashboard.targets() {
        for (name, values) in &defaults {
            for value in values {
                let chosen = BTreeMap::from_iter(
                    all().into_iter().chain([(*name, Chosen::One(value.clone()))]),
                );
                let expr = dashboard.interpolated(&target.expr, &chosen);
                let (actual, values) = if target.instant {
                    (scraped.at(&expr).await, "value")
                } else {
                    (scraped.drawn(&expr).await, "values")
                };
                let what = format!("{:?} {}: {expr}", target.panel, target.reference);
                assert!(!actual.is_empty(), "{what}");
                for series in actual {
                    drawable(&series, values, &target, &what);
                }
            }
        }
        assert!(target.repeat.is_none_or(|by| by == "quantile"), "{:?}", target.panel);
    }
}

/// A series of a heatmap has buckets, any other one numbers. A series first seen with its last
/// observations has neither.
fn drawable(series: &Value, values: &str, target: &grafana::Target, what: &str) {
    if target.kind == "heatmap" {
        let buckets =
            list(&series["histograms"]).map(|sample| list(&sample[1]["buckets"]).count()).max();
        assert!(buckets.is_some_and(|buckets| buckets > 20), "{what}: {series}");
        return;
    }
    let samples: Vec<&Value> =
        if values == "value" { vec![&series["value"]] } else { list(&series["values"]).collect() };
    let finite =
        samples.iter().any(|sample| text(&sample[1]).parse::<f64>().is_ok_and(f64::is_finite));
    assert!(finite || series["metric"]["organization_name"] == "design", "{what}: {series}");
}

const IN_RANGE: [(&str, Kind); 3] = [
    ("Regular creations in the range", Kind::Regular),
    ("Prebuilt creations in the range", Kind::Prebuild),
    ("Claims in the range", Kind::Claim),
];

async fn counts_are_exact(scraped: &Scraped, dashboard: &Dashboard) {
    let (before, after) = (Observed::before(), Observed::after());
    let number = async |panel: &str| {
        scraped.number(&dashboard.interpolated(&dashboard.expr(panel, "A"), &all())).await
    };
    for (panel, kind) in IN_RANGE {
        assert_eq!(number(panel).await, after.count(kind, |_| true), "{panel}");
    }
    let totals = [
        ("Regular creations, all time", Kind::Regular),
        ("Prebuilt creations since introduction", Kind::Prebuild),
        ("Claims since introduction", Kind::Claim),
    ];
    for (panel, kind) in totals {
        assert_eq!(
            number(panel).await,
            before.count(kind, |_| true) + after.count(kind, |_| true),
            "{panel}"
        );
    }
    let (claims, regular) =
        (after.count(Kind::Claim, |_| true), after.count(Kind::Regular, |_| true));
    assert!(
        (number("Share of claims in the range").await - claims / (claims + regular)).abs() < 1e-12
    );
    for (reference, kind) in ["A", "B", "C"].into_iter().zip(KINDS) {
        let table = scraped
            .numbers(&dashboard.interpolated(&dashboard.expr("Totals", reference), &all()))
            .await;
        assert!(table.len() >= 4, "{table:?}");
        for (labels, actual) in table {
            let named = |names: &Names| {
                LABELS
                    .iter()
                    .zip(names)
                    .all(|(label, name)| labels.get(*label).map_or("", |value| value) == *name)
            };
            assert_eq!(
                actual,
                before.count(kind, named) + after.count(kind, named),
                "{kind:?} {labels:?}"
            );
        }
    }
}

async fn chosen_names_are_taken_literally(scraped: &Scraped, dashboard: &Dashboard) {
    let after = Observed::after();
    let chosen = |variable, names: &[&'static str]| {
        BTreeMap::from_iter(all().into_iter().chain([(variable, Chosen::Some(names.to_vec()))]))
    };
    for (panel, kind) in IN_RANGE {
        let counted = async |chosen| {
            scraped.number(&dashboard.interpolated(&dashboard.expr(panel, "A"), &chosen)).await
        };
        assert_eq!(
            counted(chosen("organization", &["r&d.core"])).await,
            after.count(kind, |names| names[0] == "r&d.core")
        );
        assert_eq!(
            counted(chosen("template", &["c++ (gcc)"])).await,
            after.count(kind, |names| names[1] == "c++ (gcc)")
        );
        let presets = ["small", "large|gpu"];
        assert_eq!(
            counted(chosen("preset", &presets)).await,
            after.count(kind, |names| presets.contains(&names[2]))
        );
        // A chosen value that is gone gives 0, not an empty panel.
        assert_eq!(counted(chosen("template", &["gone"])).await, 0.0);
    }
}

async fn quantiles_are_near(scraped: &Scraped, dashboard: &Dashboard) {
    let after = Observed::after().known_before();
    let dimensions = [("organization", 1), ("template", 2), ("preset", 3)];
    for (name, kind) in ["Regular creations", "Prebuilt creations", "Claims"].into_iter().zip(KINDS)
    {
        for (reference, quantile) in [("A", "0.5"), ("B", "0.9"), ("C", "0.99")] {
            for (dimension, labels) in dimensions {
                let expr = dashboard.expr(&format!("{name} by {dimension}: $quantile"), "A");
                let chosen = BTreeMap::from_iter(
                    all().into_iter().chain([("quantile", Chosen::One(quantile.to_owned()))]),
                );
                let actual = scraped.numbers(&dashboard.interpolated(&expr, &chosen)).await;
                let truths = after.quantiles(kind, quantile.parse().unwrap(), labels);
                assert_eq!(
                    actual.iter().filter(|(_, actual)| actual.is_finite()).count(),
                    truths.len(),
                    "{actual:?}"
                );
                for (names, truth) in truths {
                    let label_text =
                        |name: &str| if name.is_empty() { "no preset" } else { name }.to_owned();
                    let wanted = LABELS
                        .iter()
                        .zip(&names)
                        .map(|(label, name)| ((*label).to_owned(), label_text(name)))
                        .collect();
                    let one = actual
                        .iter()
                        .find(|(labels, _)| *labels == wanted)
                        .unwrap_or_else(|| panic!("no {wanted:?}"));
                    near(one.1, truth, &format!("{kind:?} {names:?} {quantile}"));
                }
            }
            // All together: only series from before have a rate.
            let expr = dashboard.interpolated(
                &dashboard.expr(&format!("{name}: p50, p90, p99"), reference),
                &all(),
            );
            let truth = after.quantiles(kind, quantile.parse().unwrap(), 0)[&vec![]];
            near(scraped.number(&expr).await, truth, &format!("{kind:?} {quantile}"));
        }
    }
}

fn near(actual: f64, [low, high]: [f64; 2], what: &str) {
    assert!(
        actual / high < WIDTH && low / actual < WIDTH,
        "{what}: {low} to {high}, found {actual}"
    );
}

/// The names that Prometheus returns for a variable's query, with Grafana's series request.
async fn variables_offer_the_names(scraped: &Scraped, dashboard: &Dashboard) {
    let expected: [(&str, &[&str]); 4] = [
        ("job", &["tallyline"]),
        ("organization", &["design", "engineering", "r&d.core"]),
        ("template", &["c++ (gcc)", "docker"]),
        ("preset", &["large|gpu", "small"]),
    ];
    for (name, values) in expected {
        let query =
            dashboard.interpolated(text(&dashboard.variables()[name]["query"]["query"]), &all());
        let inside =
            query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        let (series, label) = inside.rsplit_once(", ").unwrap();
        let actual = scraped
            .server
            .get(&format!("/api/v1/label/{label}/values"), &[("match[]", series)])
            .await;
        assert_eq!(actual, serde_json::json!(values), "{query}");
    }
}

async fn freshness_is_shown(scraped: &Scraped, dashboard: &Dashboard) {
    let age = scraped
        .number(&dashboard.interpolated(&dashboard.expr("Age of the complete data", "A"), &all()))
        .await;
    assert!((age - (scraped.now - noon().timestamp() as f64)).abs() < 0.001, "{age}");
    let sequence = async |reference| {
        scraped
            .number(&dashboard.interpolated(&dashboard.expr("Ledger sequence", reference), &all()))
            .await
    };
    let (shown, ledger) = (sequence("A").await, sequence("B").await);
    assert!(shown > 0.0 && ledger > 0.0 && shown >= ledger, "{shown} of {ledger}");
    assert_eq!(scraped.process.telemetry("tallyline_shown_sequence").await, shown);
}
