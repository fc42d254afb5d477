//! Real Prometheus servers of two generations, with the shipped scrape configurations.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use chrono::TimeDelta;
use tallyline::event::{BuildStatus, Event, Payload, Topic};

use super::{Process, SOON, Site};
use crate::support::ledger::{DEPLOYMENT, build, claim};
use crate::support::prometheus::{Generation, Prometheus, Sample};
use crate::support::{eventually, setting};

/// The ratio of a native bucket's bounds in schema 3: 2^(1/8).
const WIDTH: f64 = 1.0905;
/// A scrape of the last 2 seconds may not be in the server's storage yet.
const COMMITTED: Duration = Duration::from_secs(2);
const QUANTILES: [f64; 4] = [0.1, 0.5, 0.9, 0.99];
const CREATION_BOUNDS: [f64; 8] = [1.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0];
const CLAIM_BOUNDS: [f64; 10] = [1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0];

/// The durations of each series in microseconds, by template and, for creations, type.
type Observed = BTreeMap<[&'static str; 2], Vec<i64>>;

/// From a second to an hour on a logarithmic scale, all different, in no order.
fn durations(seed: i64, count: i64, longest_seconds: f64) -> Vec<i64> {
    let part = |i: i64| ((i * 7919 + seed * 104_729) % 10_007) as f64 / 10_007.0;
    (0..count).map(|i| (1e6 * 0.5 * (longest_seconds / 0.5).powf(part(i))) as i64 + i).collect()
}

fn creations() -> Observed {
    let mut observed = Observed::new();
    observed.insert(["docker", "regular"], durations(1, 400, 5000.0));
    observed.insert(["docker", "prebuild"], durations(2, 300, 900.0));
    observed.insert(["kubernetes", "regular"], durations(3, 77, 90.0));
    // Clocks that differ: only zeros, which must not obscure the family's kind.
    observed.insert(["aws", "regular"], vec![-1_500_000, -1]);
    observed
}

fn claims() -> Observed {
    [(["docker", ""], durations(4, 250, 400.0)), (["kubernetes", ""], durations(5, 1, 10.0))].into()
}

/// One successful build of each duration.
fn builds(observed: &Observed) -> Vec<Event> {
    let all = observed.iter().flat_map(|([template, kind], durations)| {
        durations.iter().map(move |micros| (*template, *kind, *micros))
    });
    let numbers = (1_u32..).filter(|n| n % 5 != 0);
    numbers
        .zip(all)
        .map(|(n, (template, kind, micros))| {
            // Every fifth build of the harness is the pool's.
            let mut event = build(DEPLOYMENT, if kind == "prebuild" { n * 5 } else { n * 5 + 1 });
            let Payload::Build(build) = &mut event.payload else { unreachable!("it is a build") };
            build.status = BuildStatus::Succeeded;
            build.first_successful_start = true;
            build.completed_at = crate::support::ledger::noon() + TimeDelta::seconds(i64::from(n));
            build.started_at = Some(build.completed_at - TimeDelta::microseconds(micros));
            build.created_at = build.completed_at - TimeDelta::hours(2);
            (build.organization_name, build.template_name, build.preset_name) =
                ("engineering".into(), template.into(), String::new());
            event
        })
        .collect()
}

fn claimed(observed: &Observed) -> Vec<Event> {
    let all = observed.iter().flat_map(|([template, _], durations)| {
        durations.iter().map(move |micros| (*template, *micros))
    });
    (1_u32..)
        .zip(all)
        .map(|(n, (template, micros))| {
            let mut event = claim(DEPLOYMENT, n);
            let Payload::Claim(claim) = &mut event.payload else { unreachable!("it is a claim") };
            claim.status = BuildStatus::Succeeded;
            claim.completed_at = crate::support::ledger::noon() + TimeDelta::seconds(i64::from(n));
            claim.started_at = Some(claim.completed_at - TimeDelta::microseconds(micros));
            claim.created_at = claim.completed_at - TimeDelta::hours(2);
            (claim.organization_name, claim.template_name, claim.preset_name) =
                ("engineering".into(), template.into(), "small".into());
            event
        })
        .collect()
}

/// A shipped configuration with these targets, scraping five times a second. Nothing else is
/// changed.
fn shipped(name: &str, targets: &[&Process]) -> String {
    let path = format!("{}/dashboards/prometheus/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let addresses: Vec<String> = targets
        .iter()
        .map(|target| format!("{:?}", target.metrics.trim_start_matches("http://")))
        .collect();
    let changed = text
        .replace("\"127.0.0.1:2112\"", &addresses.join(", "))
        .replace("scrape_interval: 15s", "scrape_interval: 200ms");
    assert!(changed.contains("200ms") && !changed.contains("127.0.0.1:2112"), "{changed}");
    changed
}

async fn site() -> Site {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::WorkspaceBuilds, builds(&creations())).await;
    site.record(Topic::PrebuildClaims, claimed(&claims())).await;
    site.pass(&source, 0).await;
    site
}

#[tokio::test]
async fn prometheus_3_scrapes_both_kinds_of_histograms_from_one_job() {
    let site = site().await;
    let (one, other) = (site.process().await, site.process().await);
    let server =
        Prometheus::start(Generation::Three, &shipped("prometheus.yml", &[&one, &other])).await;
    let jobs = Jobs { native: "tallyline", classic: "tallyline" };
    let time = scraped(&server, &jobs, 2).await;
    // One process shows the series, both are targets, and the instance label is the same for both.
    assert_eq!(
        server.query_at("count(tallyline_build_info)", time).await,
        [(BTreeMap::new(), 2.0)]
    );
    assert_eq!(
        server.query_at("sum(tallyline_metrics_lease_held)", time).await,
        [(BTreeMap::new(), 1.0)]
    );
    let instances =
        server.query_at("count by (instance) (coderd_workspace_creation_total)", time).await;
    assert_eq!(
        instances,
        [(BTreeMap::from([("instance".to_owned(), "tallyline".to_owned())]), 3.0)]
    );
    assert_eq!(server.query_at("min(up)", time).await, [(BTreeMap::new(), 1.0)]);

    // The holder of the lease ends: the same series go on, and nothing is counted twice.
    let holds = one.telemetry("tallyline_metrics_lease_held").await > 0.0;
    let (holder, heir) = if holds { (one, other) } else { (other, one) };
    holder.end().await;
    heir.shows("").await;
    // the server marks the holder's last samples as stale: only later scrapes stay
    eventually(SOON, "the holder is known to be gone", || async {
        server.query("up == 0").await.len() == 1
    })
    .await;
    let moved = heir.metrics.trim_start_matches("http://").to_owned();
    eventually(SOON, "the heir is scraped with the series", || async {
        !server
            .query(&format!("tallyline_shown_sequence{{instance=\"{moved}\"}} > 0"))
            .await
            .is_empty()
    })
    .await;
    scraped(&server, &jobs, 1).await;
    for falls in [
        "resets(coderd_workspace_creation_total[5m]) > 0",
        "resets(coderd_workspace_creation_duration_seconds[5m]) > 0",
    ] {
        assert_eq!(server.query(falls).await, []);
    }
}

#[tokio::test]
async fn prometheus_2_scrapes_them_from_two_jobs() {
    let site = site().await;
    let process = site.process().await;
    process.shows("").await;
    let server =
        Prometheus::start(Generation::Two, &shipped("prometheus-2.yml", &[&process])).await;
    let jobs = Jobs { native: "tallyline", classic: "tallyline-classic" };
    let time = scraped(&server, &jobs, 2).await;
    assert_eq!(server.query_at("min(up)", time).await, [(BTreeMap::new(), 1.0)]);
}

#[tokio::test]
async fn promtool_accepts_the_pages() {
    let site = site().await;
    let process = site.process().await;
    process.shows("").await;
    let folder = tempfile::TempDir::new().unwrap();
    let page = reqwest::get(format!("{}/metrics?format=text", process.metrics))
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(
        page.contains("tallyline_negative_durations_total{organization_name=\"engineering\"} 2"),
        "{page}"
    );
    let file = folder.path().join("page");
    std::fs::write(&file, page).unwrap();
    let promtool = || Command::new(setting("TALLYLINE_TEST_PROMTOOL"));
    let checked = promtool()
        .args(["check", "metrics"])
        .stdin(Stdio::from(File::open(&file).unwrap()))
        .output()
        .unwrap();
    assert!(
        checked.status.success() && checked.stdout.is_empty() && checked.stderr.is_empty(),
        "{checked:?}"
    );
    // It reports real problems.
    std::fs::write(&file, "no_help_total 1\n").unwrap();
    assert!(
        !promtool()
            .args(["check", "metrics"])
            .stdin(Stdio::from(File::open(&file).unwrap()))
            .output()
            .unwrap()
            .status
            .success()
    );
    for name in ["prometheus.yml", "prometheus-2.yml"] {
        let path = format!("{}/dashboards/prometheus/{name}", env!("CARGO_MANIFEST_DIR"));
        let checked = promtool().args(["check", "config"]).arg(path).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }
}

/// The job of each kind of histogram.
struct Jobs {
    native: &'static str,
    classic: &'static str,
}

/// Waits for a time at which this many targets and both families were scraped, and checks that the
/// samples of that time equal the recorded ones. Returns that time in Unix seconds. It is in the
/// past, because a busy machine can miss one of the frequent scrapes at any moment.
async fn scraped(server: &Prometheus, jobs: &Jobs, targets: usize) -> f64 {
    let creation = "coderd_workspace_creation_duration_seconds";
    let found = Cell::new(0.0);
    eventually(Duration::from_secs(60), "both kinds are scraped", || async {
        let time = server.query("time()").await[0].1 - COMMITTED.as_secs_f64();
        found.set(time);
        let (native, classic) = (
            format!("histogram_count({creation}{{job={:?}}})", jobs.native),
            format!("{creation}_count{{job={:?}}}", jobs.classic),
        );
        server.query_at("up == 1", time).await.len() == targets
            && server.query_at(&native, time).await.len() == 4
            && server.query_at(&classic, time).await.len() == 4
    })
    .await;
    let time = found.get();
    family(server, time, jobs, creation, &creations(), &CREATION_BOUNDS).await;
    family(
        server,
        time,
        jobs,
        "coderd_prebuilt_workspace_claim_duration_seconds",
        &claims(),
        &CLAIM_BOUNDS,
    )
    .await;
    let totals = by_series(
        server
            .query_at(&format!("coderd_workspace_creation_total{{job={:?}}}", jobs.native), time)
            .await,
    );
    let regular = creations().into_iter().filter(|([_, kind], _)| *kind == "regular");
    assert_eq!(
        totals,
        regular
            .map(|([template, _], durations)| (key([template, ""]), durations.len() as f64))
            .collect()
    );
    time
}

fn key(labels: [&str; 2]) -> [String; 2] {
    labels.map(str::to_owned)
}

fn by_series(samples: Vec<Sample>) -> BTreeMap<[String; 2], f64> {
    let label = |sample: &Sample, name: &str| sample.0.get(name).cloned().unwrap_or_default();
    samples
        .into_iter()
        .map(|sample| ([label(&sample, "template_name"), label(&sample, "type")], sample.1))
        .collect()
}

async fn family(
    server: &Prometheus,
    time: f64,
    jobs: &Jobs,
    name: &str,
    observed: &Observed,
    bounds: &[f64],
) {
    let native = format!("{name}{{job={:?}}}", jobs.native);
    let classic = |suffix: &str| format!("{name}_{suffix}{{job={:?}}}", jobs.classic);
    // A negative duration is observed as 0.
    let seconds =
        |micros: &Vec<i64>| micros.iter().map(|micros| (*micros).max(0)).collect::<Vec<_>>();
    let counts: BTreeMap<_, _> =
        observed.iter().map(|(labels, micros)| (key(*labels), micros.len() as f64)).collect();
    let sums: BTreeMap<_, _> = observed
        .iter()
        .map(|(labels, micros)| (key(*labels), seconds(micros).iter().sum::<i64>() as f64 / 1e6))
        .collect();
    for query in [format!("histogram_count({native})"), classic("count")] {
        assert_eq!(by_series(server.query_at(&query, time).await), counts, "{query}");
    }
    for query in [format!("histogram_sum({native})"), classic("sum")] {
        assert_eq!(by_series(server.query_at(&query, time).await), sums, "{query}");
    }
    for bound in bounds {
        let query = format!("{name}_bucket{{job={:?},le=\"{bound}\"}}", jobs.classic);
        let below = |micros: &Vec<i64>| {
            seconds(micros).iter().filter(|micros| **micros as f64 / 1e6 <= *bound).count() as f64
        };
        let expected =
            observed.iter().map(|(labels, micros)| (key(*labels), below(micros))).collect();
        let query = if server.query_at(&query, time).await.is_empty() {
            query.replace(&format!("le=\"{bound}\""), &format!("le=\"{bound:?}\""))
        } else {
            query
        };
        assert_eq!(by_series(server.query_at(&query, time).await), expected, "{query}");
    }
    for quantile in QUANTILES {
        let from_native = by_series(
            server.query_at(&format!("histogram_quantile({quantile}, {native})"), time).await,
        );
        let from_classic = by_series(
            server
                .query_at(&format!("histogram_quantile({quantile}, {})", classic("bucket")), time)
                .await,
        );
        for (labels, micros) in observed {
            let mut sorted = seconds(micros);
            sorted.sort_unstable();
            let truth = sorted[(quantile * sorted.len() as f64).ceil() as usize - 1] as f64 / 1e6;
            let what = format!("{name} {labels:?} {quantile}: {truth}");
            let actual = from_native[&key(*labels)];
            let near = if truth == 0.0 {
                actual.abs() < 1e-30
            } else {
                actual / truth < WIDTH && truth / actual < WIDTH
            };
            assert!(near, "{what}, natively {actual}");
            in_bucket(bounds, truth, from_classic[&key(*labels)], &what);
        }
    }
}

/// A classic quantile is only as exact as the truth's bucket; beyond the last bound it is that
/// bound.
fn in_bucket(bounds: &[f64], truth: f64, actual: f64, what: &str) {
    let bucket = bounds.partition_point(|bound| *bound < truth);
    let lower = bucket.checked_sub(1).map_or(0.0, |below| bounds[below]);
    let upper = bounds.get(bucket).copied().unwrap_or(lower);
    assert!(
        (lower..=upper).contains(&actual),
        "{what}, classically {actual}, not within {lower} to {upper}"
    );
}
