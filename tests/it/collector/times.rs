//! Times that PostgreSQL can store and no event can have. Each such row is one reject that names
//! the field, and nothing stops.

use std::collections::BTreeMap;
use std::time::Duration;
use tallyline::ledger::licenses;

use serde_json::json;
use tallyline::audit::Audit;
use tallyline::collectors::{Collector, Settings};
use tallyline_sim::coderd::SchemaVersion;
use uuid::Uuid;

use super::{Store, settings, source_of, store};
use crate::support::coderd::{Build, Coderd};

const ODD: [&str; 5] = [
    "infinity",
    "-infinity",
    "294000-01-01 00:00:00Z",
    "20000-01-01 00:00:00Z",
    "0044-03-15 00:00:00Z BC",
];

/// Rows with every odd time in every column, and the field that each reject must name.
async fn odd_rows(coderd: &Coderd) -> BTreeMap<String, &'static str> {
    let mut fields = BTreeMap::new();
    for odd in ODD {
        for field in ["created_at", "started_at", "completed_at"] {
            // a claim would be a second event of the row
            let build =
                Build { stage: 2, number: 2, ..coderd.first_start(coderd.workspace().await).await };
            let id = coderd.build(&build).await;
            let update = format!(
                "update provisioner_jobs set {field} = $1::timestamptz where id = (select job_id from workspace_builds where id = $2)"
            );
            sqlx::query(sqlx::AssertSqlSafe(update))
                .bind(odd)
                .bind(id)
                .execute(&coderd.database.pool)
                .await
                .unwrap();
            fields.insert(format!("workspace_build_completed:{id}"), field);
        }
        for (column, field) in [
            ("created_at", "time"),
            ("publish_started_at", "publishstartedat"),
            ("published_at", "publishedat"),
        ] {
            let id = format!("{column} {odd}");
            coderd
                .usage(&id, "dc_managed_agents_v1", json!({"count": 1}), coderd.now().await)
                .await;
            let update =
                format!("update usage_events set {column} = $1::timestamptz where id = $2");
            sqlx::query(sqlx::AssertSqlSafe(update))
                .bind(odd)
                .bind(&id)
                .execute(&coderd.database.pool)
                .await
                .unwrap();
            fields.insert(id, field);
        }
    }
    fields
}

async fn pass(collector: &mut Collector) -> tallyline::collectors::PassReport {
    tokio::time::timeout(Duration::from_secs(60), collector.pass())
        .await
        .expect("a pass ends")
        .unwrap()
}

/// Checks that each row is one open reject with the cause `field`, and that it names the field.
async fn each_is_one_reject(store: &Store, fields: &BTreeMap<String, &'static str>) {
    let rejects: Vec<(String, String, String)> =
        sqlx::query_as("select event_id, cause, detail from reject where state = 'open'")
            .fetch_all(&store.ledger.pool)
            .await
            .unwrap();
    let details: BTreeMap<&String, &String> =
        rejects.iter().map(|(id, _, detail)| (id, detail)).collect();
    assert_eq!((details.len(), rejects.len()), (fields.len(), fields.len()), "{rejects:?}");
    assert!(rejects.iter().all(|(_, cause, _)| cause == "field"), "{rejects:?}");
    for (id, field) in fields {
        let detail =
            details.get(id).unwrap_or_else(|| panic!("{id} is not among the rejects: {rejects:?}"));
        assert!(detail.contains(&format!("field {field} ")), "{id}: {detail}");
    }
}

#[tokio::test]
async fn every_row_with_an_odd_time_is_one_reject_that_names_the_field() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let good = coderd.creation().await;
    let fields = odd_rows(&coderd).await;
    let small = Settings { page: 2, ..settings() };
    let mut collector = store.collector(small.clone(), &coderd).await;
    assert!(pass(&mut collector).await.full_sweep);
    // Before the ledger has read the log: this collector and the next know the rows as in flight.
    assert_eq!(super::produced(&pass(&mut collector).await), (0, 0, 0));
    collector.close().await;
    let mut collector = store.collector(small.clone(), &coderd).await;
    assert_eq!(super::produced(&pass(&mut collector).await), (0, 0, 0));
    store.consume().await;
    each_is_one_reject(&store, &fields).await;
    let builds: Vec<Uuid> = sqlx::query_scalar("select build_id from workspace_build")
        .fetch_all(&store.ledger.pool)
        .await
        .unwrap();
    assert_eq!(builds, [good]);
    // Afterwards: in incremental passes and in sweeps.
    collector.close().await;
    collector = store.collector(small, &coderd).await;
    assert_eq!(super::produced(&pass(&mut collector).await), (0, 0, 0));
    assert_eq!(super::produced(&store.sweep(&mut collector).await), (0, 0, 0));
    store.consume().await;
    each_is_one_reject(&store, &fields).await;
}

#[tokio::test]
async fn an_odd_time_that_comes_between_two_passes_is_one_reject_too() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(Settings { page: 2, ..settings() }, &coderd).await;
    pass(&mut collector).await;
    let fields = odd_rows(&coderd).await;
    let report = pass(&mut collector).await;
    assert!(!report.full_sweep);
    store.consume().await;
    // Only a sweep finds rows dated before all time, like all rows dated that far back.
    store.sweep(&mut collector).await;
    store.consume().await;
    each_is_one_reject(&store, &fields).await;
}

#[tokio::test]
async fn the_audit_sees_rows_with_odd_times_as_open_work() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let fields = odd_rows(&coderd).await;
    let mut collector = store.collector(settings(), &coderd).await;
    let source = Some((source_of(&coderd.database.url), coderd.deployment));
    pass(&mut collector).await;
    store.consume().await;
    let audit = Audit {
        ledger: store.ledger.clone(),
        log: store.log.clone(),
        source,
        patience: Duration::ZERO,
    };
    let report = audit.run().await.unwrap();
    let joint = &report.joints[0];
    assert_eq!(joint.differences, []);
    let open: Vec<(&str, &str)> =
        joint.open.iter().map(|open| (&*open.kind, open.id.as_str())).collect();
    assert_eq!(open.len(), fields.len());
    assert!(
        open.iter().all(|(kind, id)| *kind == "rejected" && fields.contains_key(*id)),
        "{open:?}"
    );
    assert!(report.balanced);
}

#[tokio::test]
async fn marks_that_become_odd_after_acceptance_change_nothing() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    coderd.usage("one", "dc_managed_agents_v1", json!({"count": 1}), coderd.now().await).await;
    let mut collector = store.collector(settings(), &coderd).await;
    pass(&mut collector).await;
    store.consume().await;
    sqlx::query(
        "update usage_events set publish_started_at = '-infinity', published_at = 'infinity'",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    let source = Some((source_of(&coderd.database.url), coderd.deployment));
    let audit = Audit {
        ledger: store.ledger.clone(),
        log: store.log.clone(),
        source,
        patience: Duration::ZERO,
    };
    let report = audit.run().await.unwrap();
    assert!(report.balanced && report.joints[0].open.is_empty(), "{report:?}");
}

#[tokio::test]
async fn odd_times_of_marks_hours_and_licenses_are_read() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    sqlx::raw_sql(
        "insert into licenses (uploaded_at, jwt, exp, uuid) values ('-infinity', 'a.b.c', 'infinity', gen_random_uuid()),
             ('294000-01-01Z', 'd.e.f', '294000-01-01Z', gen_random_uuid());
         insert into usage_events (id, event_type, event_data, created_at, published_at) values
             ('forever', 'hb_agent_runtime_v1', '{\"runtime_ms\": 1}', 'infinity', 'infinity'),
             ('far', 'hb_agent_runtime_v1', '{\"runtime_ms\": 1}', '294000-01-01 00:00:00Z', '294000-01-01Z'),
             ('marked', 'dc_managed_agents_v1', '{\"count\": 1}', now(), '2026-01-02 03:04:05Z')",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    let mut collector = store.collector(settings(), &coderd).await;
    assert!(pass(&mut collector).await.runtime_complete_until.is_some());
    let licenses = store
        .ledger
        .run(async |conn| licenses::present(conn, collector.source().id).await)
        .await
        .unwrap();
    assert!(
        licenses.len() == 2 && licenses.iter().all(|license| license.uploaded_at.is_none()),
        "{licenses:?}"
    );
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    let mark = reader.latest_publish_mark().await.unwrap().unwrap();
    assert_eq!(
        mark.to_rfc3339(),
        "2026-01-02T03:04:05+00:00",
        "a mark of no time hides the real ones"
    );
}
