//! The expected content of `/metrics`, computed from plain lists of numbers by code that Tallyline
//! does not use.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tallyline_sim::coderd::Truth;
use tallyline_sim::coderd::truth::{CreationType, Labels};

use crate::oracle::{self, Names};

/// The name of a family and its labels.
pub type Key = (String, Vec<(String, String)>);

/// The value of a series.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Counter(f64),
    Histogram {
        count: u64,
        sum_seconds: f64,
        /// Upper bound and cumulative count.
        classic: Vec<(f64, u64)>,
        schema: i32,
        zero_threshold: f64,
        zero_count: u64,
        /// Index and count, without empty buckets.
        native: BTreeMap<i32, u64>,
    },
}

/// The numbers behind all series, from one oracle.
#[derive(Debug, PartialEq, Eq)]
pub struct Numbers {
    creations: BTreeMap<Labels, u64>,
    creation_micros: BTreeMap<(Labels, CreationType), Vec<u64>>,
    claim_micros: BTreeMap<Labels, Vec<u64>>,
    negative_durations: BTreeMap<String, u64>,
}

const CREATION_BOUNDS: &[u32] = &[1, 10, 30, 60, 300, 600, 1800, 3600];
const CLAIM_BOUNDS: &[u32] = &[1, 5, 10, 20, 30, 60, 120, 180, 240, 300];
/// Beyond this number of native buckets, the resolution is halved.
const MOST_BUCKETS: usize = 100;

impl Numbers {
    /// From the simulator's own bookkeeping.
    pub fn of_truth(truth: &Truth, introduced: DateTime<Utc>) -> Numbers {
        let mut negative_durations = BTreeMap::new();
        let creations =
            truth.creation_seconds.iter().map(|series| (&series.labels, &series.observations));
        let claims =
            truth.claim_seconds.iter().map(|series| (&series.labels, &series.observations));
        for (labels, observations) in creations.chain(claims) {
            let skewed = observations
                .iter()
                .filter(|one| one.skewed && one.completed_at >= introduced)
                .count() as u64;
            if skewed > 0 {
                *negative_durations.entry(labels.organization_name.clone()).or_default() += skewed;
            }
        }
        Numbers {
            creations: truth.creation_totals(),
            creation_micros: truth.creation_micros(introduced),
            claim_micros: truth.claim_micros(introduced),
            negative_durations,
        }
    }

    /// From coderd's own predicates.
    pub async fn of_coderd(coderd: &PgPool, names: &Names, introduced: DateTime<Utc>) -> Numbers {
        Numbers {
            creations: oracle::creation_totals(coderd, names).await,
            creation_micros: oracle::creation_micros(coderd, names, introduced).await,
            claim_micros: oracle::claim_micros(coderd, names, introduced).await,
            negative_durations: oracle::negative_durations(coderd, names, introduced).await,
        }
    }

    pub fn series(&self) -> BTreeMap<Key, Value> {
        let mut series = BTreeMap::new();
        for (labels, count) in &self.creations {
            series.insert(
                key("coderd_workspace_creation_total", labels, None),
                Value::Counter(*count as f64),
            );
        }
        for ((labels, kind), micros) in &self.creation_micros {
            let key = key("coderd_workspace_creation_duration_seconds", labels, Some(kind.label()));
            series.insert(key, histogram(micros, CREATION_BOUNDS));
        }
        for (labels, micros) in &self.claim_micros {
            series.insert(
                key("coderd_prebuilt_workspace_claim_duration_seconds", labels, None),
                histogram(micros, CLAIM_BOUNDS),
            );
        }
        for (organization, count) in &self.negative_durations {
            let labels = vec![("organization_name".to_owned(), organization.clone())];
            series.insert(
                ("tallyline_negative_durations_total".to_owned(), labels),
                Value::Counter(*count as f64),
            );
        }
        series
    }
}

/// The instants of all additions to each series: one of them is when it began.
pub fn instants(
    truth: &Truth,
    introduced: DateTime<Utc>,
) -> BTreeMap<Key, BTreeSet<DateTime<Utc>>> {
    let mut instants: BTreeMap<Key, BTreeSet<DateTime<Utc>>> = BTreeMap::new();
    for build in truth.builds.iter().filter(|build| build.counted_as_creation) {
        instants
            .entry(key("coderd_workspace_creation_total", &build.labels, None))
            .or_default()
            .insert(build.completed_at);
    }
    let creations = truth.creation_seconds.iter().map(|series| {
        (
            key(
                "coderd_workspace_creation_duration_seconds",
                &series.labels,
                Some(series.kind.label()),
            ),
            &series.labels,
            &series.observations,
        )
    });
    let claims = truth.claim_seconds.iter().map(|series| {
        (
            key("coderd_prebuilt_workspace_claim_duration_seconds", &series.labels, None),
            &series.labels,
            &series.observations,
        )
    });
    for (key, labels, observations) in creations.chain(claims) {
        for observation in observations.iter().filter(|one| one.completed_at >= introduced) {
            instants.entry(key.clone()).or_default().insert(observation.completed_at);
            if observation.skewed {
                let labels =
                    vec![("organization_name".to_owned(), labels.organization_name.clone())];
                let key = ("tallyline_negative_durations_total".to_owned(), labels);
                instants.entry(key).or_default().insert(observation.completed_at);
            }
        }
    }
    instants
}

/// The lines of a series on the text page, without native buckets.
pub fn samples((family, labels): &Key, value: &Value) -> Vec<(String, f64)> {
    let line = |suffix: &str, bound: Option<String>| {
        let mut pairs: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        pairs.extend(bound.map(|bound| format!("le=\"{bound}\"")));
        format!("{family}{suffix}{{{}}}", pairs.join(","))
    };
    match value {
        Value::Counter(count) => vec![(line("", None), *count)],
        Value::Histogram { count, sum_seconds, classic, .. } => {
            let mut lines =
                vec![(line("_count", None), *count as f64), (line("_sum", None), *sum_seconds)];
            lines.extend(
                classic.iter().map(|(bound, within)| {
                    (line("_bucket", Some(bound.to_string())), *within as f64)
                }),
            );
            lines.push((line("_bucket", Some("+Inf".to_owned())), *count as f64));
            lines
        }
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

fn key(family: &str, labels: &Labels, kind: Option<&str>) -> Key {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let mut pairs = vec![
        pair("organization_name", &labels.organization_name),
        pair("preset_name", &labels.preset_name),
        pair("template_name", &labels.template_name),
    ];
    pairs.extend(kind.map(|kind| pair("type", kind)));
    (family.to_owned(), pairs)
}

fn histogram(micros: &[u64], bounds: &[u32]) -> Value {
    let classic = bounds.iter().map(|bound| {
        let within =
            micros.iter().filter(|micros| **micros <= u64::from(*bound) * 1_000_000).count();
        (f64::from(*bound), within as u64)
    });
    let mut native: BTreeMap<i32, u64> = BTreeMap::new();
    for micros in micros.iter().filter(|micros| **micros > 0) {
        *native.entry(index(*micros as f64 / 1e6)).or_default() += 1;
    }
    let mut schema = 3;
    while native.len() > MOST_BUCKETS {
        schema -= 1;
        let finer = std::mem::take(&mut native);
        for (index, count) in finer {
            *native.entry((index + 1).div_euclid(2)).or_default() += count;
        }
    }
    Value::Histogram {
        count: micros.len() as u64,
        sum_seconds: micros.iter().sum::<u64>() as f64 / 1e6,
        classic: classic.collect(),
        schema,
        zero_threshold: 2_f64.powi(-128),
        zero_count: micros.iter().filter(|micros| **micros == 0).count() as u64,
        native,
    }
}

/// The bucket of schema 3 by definition: the lowest index whose upper bound is at least the value.
fn index(seconds: f64) -> i32 {
    (-200..200)
        .find(|index| upper_bound(*index) >= seconds)
        .expect("a duration of microseconds to years")
}

/// 2^(index/8), by the bounds that Prometheus' own client and server share: fractions in [0.5, 1),
/// every 32nd of schema 8.
fn upper_bound(index: i32) -> f64 {
    static FRACTIONS: std::sync::LazyLock<Vec<f64>> = std::sync::LazyLock::new(|| {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../data/native_histogram_vectors.json"))
                .expect("the reference's vectors");
        let bounds = vectors["bounds_schema_8"].as_array().expect("a list");
        bounds.iter().step_by(32).map(|bound| bound.as_f64().expect("a number")).collect()
    });
    let place = usize::try_from(index.rem_euclid(8)).expect("0 to 7");
    FRACTIONS[place] * 2_f64.powi(index.div_euclid(8) + 1)
}

#[test]
fn powers_of_two_are_upper_bounds_and_the_reference_s_own_indices_are_found() {
    assert_eq!([0.5, 1.0, 2.0, 4.0, 64.0].map(index), [-8, 0, 8, 16, 48]);
    assert_eq!([0.5, 1.0, 2.0, 4.0, 64.0].map(|value| index(value + 1e-6)), [-7, 1, 9, 17, 49]);
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../../data/native_histogram_vectors.json")).unwrap();
    let mut compared = 0;
    for vector in vectors["bucket_index"].as_array().unwrap() {
        let (Some(value), Some(3), Some(expected)) =
            (vector[0].as_f64(), vector[1].as_i64(), vector[2].as_i64())
        else {
            continue;
        };
        if (1e-6..1e6).contains(&value) {
            assert_eq!(i64::from(index(value)), expected, "{value}");
            compared += 1;
        }
    }
    assert!(compared > 5, "{compared}");
}
