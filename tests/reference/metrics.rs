//! docs/reference/metrics.md: every series, from the collectors that the roles register.

use std::collections::BTreeSet;

use chrono::DateTime;
use prometheus::Registry;
use prometheus::core::Collector;
use prometheus::proto::MetricType;
use tallyline::api::{ApiTelemetry, RejectsTelemetry};
use tallyline::audit::AuditTelemetry;
use tallyline::cli::roles::{PruneTelemetry, paused_gauge};
use tallyline::collectors::CollectorTelemetry;
use tallyline::consumer::ConsumerTelemetry;
use tallyline::event::Fact;
use tallyline::publisher::PublisherTelemetry;
use tallyline::stages::{
    CLAIM_SECONDS, CREATION_SECONDS, CREATIONS, MetricsState, NEGATIVE_DURATIONS, Stage as _,
};
use uuid::Uuid;

use crate::table::{code, codes, table};

const INTRODUCTION: &str = "\
# Metrics

A process with the role `serve` shows its metrics at `serve.metrics_listen`, another process at
`telemetry.listen`. One serving process at a time shows the domain series; the others show only
their own metrics. A series with labels is absent until its first value, unless its text says
otherwise.
";

const DOMAIN: &str = "\
## Domain series

Names and labels of the series that begin with `coderd_` are coderd's own. Names of organizations,
templates and presets are those of the first collection: a rename does not change a series.
Histograms have classic and native buckets. They contain builds and claims completed since the
introduction of the source, the setting `source.introduced_at`.
";

/// Each label's values.
const LABELS: &[(&str, &str)] = &[
    ("cause", "the cause of a reject, as in [bad input](bad-input.md)"),
    ("disposition", "the disposition of a record, as in [bad input](bad-input.md)"),
    ("joint", "two sides that an audit compares, such as `log and ledger`"),
    (
        "kind",
        "of rows: `build` or `usage`; of removed rows: `reject_payloads`, `attempts`, `plans` or `snapshots`; of failed requests: `license`, `unreachable`, `unanswered`, `status` or `undecodable`",
    ),
    ("operation", "an operation that can be paused: `collect`, `consume`, `publish`, `export`"),
    ("organization_name", "the name of the workspace's organization"),
    ("preset_name", "the name of the build's preset; empty without one"),
    (
        "reason",
        "why the domain series were withheld: `not_holder`, `ledger_away`, `behind`, `backfilling`, `recovering`, `unknown_source`, `no_source` or `several_sources`",
    ),
    ("source", "the deployment id of coderd; empty for a joint of all sources"),
    ("stage", "`metrics` or `licenses`"),
    ("state", "the final state of a publication: `not_ours`, `expired` or `unknown`"),
    ("template_name", "the name of the workspace's template"),
    ("topic", "the topic, without the configured prefix"),
    ("type", "`regular` or `prebuild`"),
    ("unit", "the unit of the usage; `unknown` if it could not be read"),
    ("verdict", "the verdict of the vendor"),
    ("version", "the version of the binary"),
];

/// One family of series.
struct Family {
    name: String,
    kind: MetricType,
    labels: Vec<String>,
    help: String,
}

pub fn page() -> String {
    let sections = sections();
    let mut page = format!("{INTRODUCTION}\n{}", labels(&sections));
    for (heading, families) in &sections {
        let rows = families.iter().map(|family| {
            let labels = codes(family.labels.iter().map(String::as_str));
            [code(&family.name), kind(family.kind).to_owned(), labels, family.help.clone()]
        });
        page += &format!("\n{heading}\n{}", table(["metric", "type", "labels", "value"], rows));
    }
    page
}

/// Every family, by the role that registers it.
fn sections() -> [(&'static str, Vec<Family>); 7] {
    let registry = Registry::new();
    let serve = ApiTelemetry::register(&registry).unwrap().collectors();
    let rejects = RejectsTelemetry::register(&registry).unwrap().collectors();
    let audit = AuditTelemetry::register(&registry, true).unwrap().collectors();
    let collect = CollectorTelemetry::register(&registry).unwrap().collectors();
    let mut consume = ConsumerTelemetry::register(&registry).unwrap().collectors();
    consume.extend(PruneTelemetry::register(&registry).unwrap().collectors());
    let publish = PublisherTelemetry::register(&registry).unwrap().collectors();
    let paused: Box<dyn Collector> = Box::new(paused_gauge().unwrap());
    [
        (DOMAIN, domain()),
        ("## Role serve\n", described(serve.into_iter().chain(rejects))),
        ("## Audits of the roles collect, publish and serve\n", described(audit)),
        ("## Role collect\n", described(collect)),
        ("## Role consume\n", described(consume)),
        ("## Role publish\n", described(publish)),
        ("## Every process\n", described([paused])),
    ]
}

/// The families of collectors. Each collector has one.
fn described(collectors: impl IntoIterator<Item = Box<dyn Collector>>) -> Vec<Family> {
    let family = |collector: Box<dyn Collector>| {
        let (descriptions, collected) = (collector.desc(), collector.collect());
        let ([description], [family]) = (descriptions.as_slice(), collected.as_slice()) else {
            panic!("a collector of other than one family: {descriptions:?}")
        };
        Family {
            name: description.fq_name.clone(),
            kind: family.get_field_type(),
            labels: description.variable_labels.clone(),
            help: description.help.clone(),
        }
    };
    collectors.into_iter().map(family).collect()
}

/// The families that a deployment without events shows.
fn domain() -> Vec<Family> {
    let (deployment, introduced_at) = (Uuid::nil(), DateTime::UNIX_EPOCH);
    let mut state = MetricsState::default();
    state.apply(&Fact::Introduced { deployment, introduced_at }).unwrap();
    let labels: [(&str, &[&str]); 4] = [
        (CREATIONS.name, &CREATIONS.labels),
        (CREATION_SECONDS.name, &CREATION_SECONDS.labels),
        (CLAIM_SECONDS.name, &CLAIM_SECONDS.labels),
        (NEGATIVE_DURATIONS.name, &NEGATIVE_DURATIONS.labels),
    ];
    let families = state.deployment(deployment).unwrap().families();
    let family = |family: prometheus::proto::MetricFamily| {
        let labels = labels.iter().find(|(name, _)| *name == family.name());
        let (_, labels) =
            labels.unwrap_or_else(|| panic!("{}: add its labels here", family.name()));
        Family {
            name: family.name().to_owned(),
            kind: family.get_field_type(),
            labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            help: family.help().to_owned(),
        }
    };
    families.into_iter().map(family).collect()
}

/// The labels that are used, with their meanings.
fn labels(sections: &[(&str, Vec<Family>)]) -> String {
    let families = sections.iter().flat_map(|(_, families)| families);
    let used: BTreeSet<&String> = families.flat_map(|family| &family.labels).collect();
    let rows = used.into_iter().map(|label| {
        let known = LABELS.iter().find(|(known, _)| known == label);
        let (_, meaning) = known.unwrap_or_else(|| panic!("{label}: add its meaning here"));
        [code(label), (*meaning).to_owned()]
    });
    format!("## Labels\n\n{}", table(["label", "value"], rows))
}

fn kind(kind: MetricType) -> &'static str {
    match kind {
        MetricType::COUNTER => "counter",
        MetricType::GAUGE => "gauge",
        MetricType::HISTOGRAM => "histogram",
        other => panic!("{other:?}: a type that no series of ours has"),
    }
}
