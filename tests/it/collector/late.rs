//! Rows that come later than their date. They are found within minutes, without a sweep,
//! also after a restart of the collector.

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use prometheus::Registry;
use serde_json::json;
use tallyline::clock::Clock;
use tallyline::collectors::{Collector, CollectorTelemetry, Settings};
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::collector_requests;
use tallyline::license::PublicKeys;
use tallyline_sim::coderd::SchemaVersion;
use uuid::Uuid;

use super::cost::Reads;
use super::{Store, produced, source_of, store};
use crate::support::coderd::{Build, Coderd};

/// A deployment whose first sweep is over, and a clock that the test moves.
struct Site {
    coderd: Coderd,
    store: Store,
    clock: Clock,
    begun: DateTime<Utc>,
    settings: Settings,
}

impl Site {
    /// The clock is an hour behind, so that the test can move it without passing the database's
    /// clock.
    async fn new() -> (Site, Collector) {
        let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
        let begun = coderd.now().await - TimeDelta::hours(1);
        let settings = Settings { deployment_id: Some(coderd.deployment), ..Settings::new("test") };
        let site = Site { coderd, store, clock: Clock::manual(begun), begun, settings };
        let mut collector = site.open().await;
        assert!(collector.pass().await.unwrap().full_sweep);
        site.store.consume().await;
        (site, collector)
    }

    async fn open(&self) -> Collector {
        let (log, ledger) = (self.store.log.clone(), self.store.ledger.clone());
        let source = source_of(&self.coderd.database.url);
        Collector::open(
            self.settings.clone(),
            source,
            PublicKeys::new(),
            log,
            ledger,
            self.clock.clone(),
        )
        .await
        .unwrap()
        .unwrap()
    }

    fn at(&self, after: TimeDelta) -> DateTime<Utc> {
        self.begun + after
    }

    fn later(&self, after: TimeDelta) {
        self.clock.set(self.at(after));
    }

    async fn build_completed(&self, completed_at: DateTime<Utc>) -> Uuid {
        self.coderd
            .build(&Build {
                completed_at,
                ..self.coderd.first_start(self.coderd.workspace().await).await
            })
            .await
    }

    /// The same collector, or another one that takes over from it.
    async fn go_on(&self, collector: Collector, restarted: bool) -> Collector {
        if !restarted {
            return collector;
        }
        collector.close().await;
        self.open().await
    }
}

#[tokio::test]
async fn a_build_90_s_late_or_of_a_clock_3_minutes_slow_is_found_within_two_minutes() {
    for (late, restarted) in [(90, false), (90, true), (180, false), (180, true)] {
        let (site, mut collector) = Site::new().await;
        site.later(TimeDelta::seconds(200));
        collector.pass().await.unwrap();
        let id = site.build_completed(site.at(TimeDelta::seconds(200 - late))).await;
        collector = site.go_on(collector, restarted).await;
        site.later(TimeDelta::seconds(320));
        let report = collector.pass().await.unwrap();
        assert_eq!(
            (produced(&report), report.full_sweep, report.late),
            ((1, 0, 0), false, 1),
            "{late} s, restarted: {restarted}"
        );
        assert!(site.store.builds().await.contains_key(&id));
        site.later(TimeDelta::seconds(400));
        assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 0), "once");
    }
}

#[tokio::test]
async fn a_build_up_to_an_hour_late_is_found_within_half_an_hour() {
    for (restarted, found_after) in [(false, 31), (true, 29)] {
        let (site, mut collector) = Site::new().await;
        // it comes just after a pass that reaches back over the overlap
        let id = site.build_completed(site.begun - TimeDelta::minutes(59)).await;
        site.later(TimeDelta::minutes(29));
        assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 0));
        collector = site.go_on(collector, restarted).await;
        site.later(TimeDelta::minutes(found_after));
        let report = collector.pass().await.unwrap();
        assert_eq!(
            (produced(&report), report.full_sweep, report.late),
            ((1, 0, 0), false, 1),
            "restarted: {restarted}"
        );
        assert!(site.store.builds().await.contains_key(&id));
    }
}

#[tokio::test]
async fn usage_dated_9_days_back_is_found_within_minutes() {
    for restarted in [false, true] {
        let (site, mut collector) = Site::new().await;
        for (id, days) in [("nine", 9), ("thirty", 30)] {
            site.coderd
                .usage(
                    id,
                    "dc_managed_agents_v1",
                    json!({"count": 1}),
                    site.begun - TimeDelta::days(days),
                )
                .await;
        }
        collector = site.go_on(collector, restarted).await;
        site.later(TimeDelta::minutes(5));
        let report = collector.pass().await.unwrap();
        assert_eq!(
            (produced(&report), report.full_sweep, report.late),
            ((0, 0, 2), false, 2),
            "restarted: {restarted}"
        );
        assert_eq!(site.store.usage_ids().await, ["nine", "thirty"]);
        // The ledger has not read it, then it has: the collector knows it in both cases.
        for minutes in [10, 15] {
            site.later(TimeDelta::minutes(minutes));
            assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 0));
            site.store.consume().await;
        }
    }
}

#[tokio::test]
async fn a_day_that_differs_by_a_rejected_row_still_shows_the_next_late_row() {
    let (site, mut collector) = Site::new().await;
    let dated = site.begun - TimeDelta::days(9);
    site.coderd.usage("rejected", "dc_managed_agents_v1", json!({"count": 0}), dated).await;
    for minutes in [5, 10] {
        site.later(TimeDelta::minutes(minutes));
        collector.pass().await.unwrap();
        site.store.consume().await;
    }
    assert_eq!(site.store.usage_ids().await, ["rejected"], "sent once");
    site.coderd.usage("late", "dc_managed_agents_v1", json!({"count": 1}), dated).await;
    site.later(TimeDelta::minutes(15));
    assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 1));
    assert_eq!(site.store.usage_ids().await, ["late", "rejected"]);
}

/// Counts over all types would be the same on both sides.
#[tokio::test]
async fn a_late_row_is_found_beside_a_forged_one_of_another_type_and_the_same_day() {
    let (site, mut collector) = Site::new().await;
    let dated = site.begun - TimeDelta::days(9);
    let forged = Usage {
        id: "forged".into(),
        quantity: UsageQuantity::AiSeats(1),
        created_at: dated.trunc_subsecs(6),
        marks: PublishMarks::default(),
    };
    let forged = Event { deployment: site.coderd.deployment, payload: Payload::Usage(forged) };
    site.store.log.append(Topic::AgentUsage, vec![forged.to_message()]).await.unwrap();
    site.store.consume().await;
    site.coderd.usage("late", "dc_managed_agents_v1", json!({"count": 1}), dated).await;
    site.later(TimeDelta::minutes(5));
    assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 1));
}

/// At no pass has the consumer read all earlier passes.
#[tokio::test]
async fn a_consumer_that_is_always_a_pass_behind_does_not_postpone_the_counts_of_days() {
    let (site, mut collector) = Site::new().await;
    let mut late = 0;
    for minutes in 1..=5 {
        let ends = site.store.ends().await;
        site.coderd
            .usage(
                &format!("now-{minutes}"),
                "dc_managed_agents_v1",
                json!({"count": 1}),
                site.at(TimeDelta::minutes(minutes)),
            )
            .await;
        if minutes == 2 {
            site.coderd
                .usage(
                    "nine",
                    "dc_managed_agents_v1",
                    json!({"count": 1}),
                    site.begun - TimeDelta::days(9),
                )
                .await;
        }
        site.later(TimeDelta::minutes(minutes));
        late += collector.pass().await.unwrap().late;
        site.store.consume_to(&ends).await;
    }
    assert_eq!(late, 1);
    assert!(site.store.usage_ids().await.contains(&"nine".to_owned()));
}

#[tokio::test]
async fn counts_of_days_read_the_rows_of_these_days_by_the_index() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    // 600 days, of which 31 are compared; a third is published at its date, the latest is reserved.
    sqlx::raw_sql(
        "alter table usage_events disable trigger all;
         insert into usage_events (id, event_type, event_data, created_at, publish_started_at, published_at)
         select n::text, 'dc_managed_agents_v1', '{\"count\": 1}', at, case when n < 100 then at end, case when n % 3 = 0 and n >= 100 then at end
         from (select n, now() - n * interval '10 minutes' as at from generate_series(1, 86400) n) as dated",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    sqlx::query("vacuum analyze usage_events").execute(&coderd.database.pool).await.unwrap();
    let index = "idx_usage_events_select_for_publishing";
    let before = Reads::of(&coderd.database.pool, index).await;
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    let now = coderd.now().await;
    let (from, until) = (now - TimeDelta::days(31), now + TimeDelta::days(1));
    let counted: i64 = reader.usage_days(from, until).await.unwrap().values().sum();
    reader.close().await;
    let read = before.entries_since(&coderd.database.pool, index).await;
    assert!(
        (counted..86_400 / 10).contains(&read),
        "{read} of 86400 entries for a twentieth of the rows"
    );
    let expected: i64 = sqlx::query_scalar(
        "select count(*) from usage_events where created_at >= $1 and created_at < $2",
    )
    .bind(from)
    .bind(until)
    .fetch_one(&coderd.database.pool)
    .await
    .unwrap();
    assert_eq!(counted, expected);
}

#[tokio::test]
async fn rows_that_the_audit_misses_are_fetched_by_id() {
    let (site, mut collector) = Site::new().await;
    let source = collector.source().id;
    let build = site.build_completed(site.begun - TimeDelta::hours(5)).await;
    site.coderd
        .usage("old", "dc_managed_agents_v1", json!({"count": 1}), site.begun - TimeDelta::days(40))
        .await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 0), "neither is near");
    let ids =
        [format!("workspace_build_completed:{build}"), "old".to_owned(), "not there".to_owned()];
    assert_eq!(
        site.store
            .ledger
            .run(async |conn| collector_requests::add_fetch(conn, source, &ids).await)
            .await
            .unwrap(),
        3
    );
    assert_eq!(
        site.store
            .ledger
            .run(async |conn| collector_requests::add_fetch(conn, source, &ids).await)
            .await
            .unwrap(),
        0,
        "asked for already"
    );
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 1));
    assert_eq!(
        site.store
            .ledger
            .run(async |conn| collector_requests::fetches(conn, source, 10).await)
            .await
            .unwrap(),
        Vec::<String>::new(),
        "answered"
    );
    site.store.consume().await;
    // The ledger lost a row: the collector does not rely on its memory.
    collector.pass().await.unwrap();
    sqlx::query("delete from workspace_build").execute(&site.store.ledger.pool).await.unwrap();
    collector.pass().await.unwrap();
    site.store
        .ledger
        .run(async |conn| collector_requests::add_fetch(conn, source, &ids).await)
        .await
        .unwrap();
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
}

#[tokio::test]
async fn a_requested_sweep_reads_everything_in_the_next_pass() {
    let (site, mut collector) = Site::new().await;
    let (source, ledger) = (collector.source().id, site.store.ledger.clone());
    site.build_completed(site.begun - TimeDelta::hours(5)).await;
    ledger.run(async |conn| collector_requests::add_sweep(conn, source).await).await.unwrap();
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.full_sweep), ((1, 0, 0), true));
    let done = ledger
        .run(async |conn| collector_requests::sweep(conn, source).await)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((done.pass_id, done.rows_read), (Some(report.pass_id), 1));
    assert!(!collector.pass().await.unwrap().full_sweep, "once");
    // A sweep whose collector died starts again; a request in between is another sweep.
    ledger.run(async |conn| collector_requests::add_sweep(conn, source).await).await.unwrap();
    ledger
        .run(async |conn| collector_requests::begin_sweep(conn, source).await)
        .await
        .unwrap()
        .unwrap();
    collector = site.go_on(collector, true).await;
    assert!(collector.pass().await.unwrap().full_sweep);
}

#[tokio::test]
async fn late_rows_are_counted_with_their_age() {
    let (mut site, collector) = Site::new().await;
    let registry = Registry::new();
    site.settings.telemetry = CollectorTelemetry::register(&registry).unwrap();
    let mut collector = site.go_on(collector, true).await;
    site.later(TimeDelta::minutes(10));
    collector.pass().await.unwrap();
    site.build_completed(site.at(TimeDelta::minutes(6))).await;
    site.coderd
        .usage(
            "nine",
            "dc_managed_agents_v1",
            json!({"count": 1}),
            site.at(TimeDelta::minutes(10)) - TimeDelta::days(9),
        )
        .await;
    let hour = DateTime::from_timestamp(site.begun.timestamp() / 3600 * 3600 - 86_400, 0).unwrap();
    site.coderd.usage("hour", "hb_agent_runtime_v1", json!({"runtime_ms": 5}), hour).await;
    site.later(TimeDelta::minutes(16));
    assert_eq!(collector.pass().await.unwrap().late, 2);
    let families = registry.gather();
    let family =
        families.iter().find(|family| family.name() == "tallyline_collector_late_seconds").unwrap();
    let samples: Vec<(String, u64, f64)> = family
        .get_metric()
        .iter()
        .map(|metric| {
            let histogram = metric.get_histogram();
            (
                metric.get_label()[0].value().to_owned(),
                histogram.get_sample_count(),
                histogram.get_sample_sum(),
            )
        })
        .collect();
    assert_eq!(
        samples,
        [("build".to_owned(), 1, 600.0), ("usage".to_owned(), 1, 9.0 * 86_400.0 + 360.0)]
    );
}
