//! An audit of everything that was interrupted goes on, and judges earlier differences again.

use std::sync::Mutex;
use std::time::Duration;

use tallyline::audit::{Audit, AuditPhase, AuditReport};
use tallyline::coderd;
use tallyline::ledger::books::{self, Reading};

use crate::audit::{LOG, SOURCE, Site, differences, number, remarks};

impl Site {
    fn whole_audit(&self) -> Audit {
        let database =
            coderd::Database::new(&self.coderd.database.url, Duration::from_secs(30)).unwrap();
        Audit {
            ledger: self.ledger.clone(),
            log: self.log.clone(),
            source: Some((database, self.coderd.deployment)),
            patience: Duration::ZERO,
        }
    }

    async fn audit_from(&self, from_start: bool) -> AuditReport {
        self.whole_audit().run_from(from_start, &|_, _, _| {}).await.unwrap()
    }

    /// Begins an audit that fails after it has compared the builds: coderd's usage is not readable.
    async fn interrupted_audit(&self) {
        let coderd = &self.coderd.database.pool;
        let fails = "alter table usage_events rename to elsewhere;
            create view usage_events as select (1 / (length(id) - length(id)))::text as id, event_type, event_data, created_at,
                publish_started_at, published_at, failure_message from elsewhere";
        sqlx::raw_sql(fails).execute(coderd).await.unwrap();
        self.whole_audit().run_from(true, &|_, _, _| {}).await.unwrap_err();
        let mends = "drop view usage_events; alter table elsewhere rename to usage_events";
        sqlx::raw_sql(mends).execute(coderd).await.unwrap();
        let places = "select count(*) from audit_progress where deployment_id is not null";
        let places: i64 = sqlx::query_scalar(places).fetch_one(&self.ledger.pool).await.unwrap();
        assert_eq!(places, 1, "its place is saved");
    }

    async fn remove_creation(&self) -> String {
        sqlx::query("create table removed as select * from workspace_build where build_id = $1")
            .bind(self.creation)
            .execute(&self.ledger.pool)
            .await
            .unwrap();
        self.tamper("delete from workspace_build where build_id in (select build_id from removed)")
            .await;
        format!("workspace_build_completed:{}", self.creation)
    }
}

#[tokio::test]
async fn an_interrupted_audit_goes_on_unless_it_begins_from_the_start() {
    let site = Site::new().await;
    site.interrupted_audit().await;
    // the audit of the source has compared builds, and does not read them again
    let id = site.remove_creation().await;
    let missing = |report: &AuditReport| differences(report).contains(&(SOURCE, "missing", &id));
    let resumed = site.audit_from(false).await;
    assert!(!missing(&resumed), "{resumed:?}");
    assert!(remarks(&resumed).iter().any(|(kind, _)| *kind == "resumed"));
    assert_eq!(number(&resumed, SOURCE, "source_builds"), 3, "those of the first part, too");
    assert_eq!(number(&resumed, SOURCE, "source_usage"), 1);
    // it has ended, so the next one begins from the start
    assert!(missing(&site.audit_from(false).await));

    site.tamper("insert into workspace_build select * from removed; drop table removed").await;
    site.interrupted_audit().await;
    site.remove_creation().await;
    let from_start = site.audit_from(true).await;
    assert!(missing(&from_start), "{from_start:?}");
    assert!(!remarks(&from_start).iter().any(|(kind, _)| *kind == "resumed"));
}

#[tokio::test]
async fn a_row_that_differed_before_the_interruption_is_judged_again() {
    let site = Site::new().await;
    let id = site.remove_creation().await;
    site.interrupted_audit().await;
    let restore = "insert into workspace_build select * from removed";
    site.tamper(restore).await;
    assert_eq!(differences(&site.audit_from(false).await), []);

    site.tamper("delete from workspace_build where build_id in (select build_id from removed)")
        .await;
    site.interrupted_audit().await;
    let resumed = site.audit_from(false).await;
    assert!(differences(&resumed).contains(&(SOURCE, "missing", &id)), "{resumed:?}");
}

#[tokio::test]
async fn a_difference_in_the_ledger_is_judged_again_after_an_interruption() {
    let site = Site::new().await;
    site.tamper("create table queued as select * from publication").await;
    for is_restored in [false, true] {
        site.tamper("delete from publication").await;
        let (mut reading, now) = (Reading::default(), site.ledger.clock.now());
        let first = site.ledger.run(async |conn| reading.read(conn).await).await.unwrap();
        assert!(first.is_none(), "it has more pages");
        site.ledger.run(async |conn| books::save(conn, &reading, now).await).await.unwrap();
        if is_restored {
            site.tamper("insert into publication select * from queued").await;
        }
        let report = site.audit_from(false).await;
        let unqueued =
            differences(&report).iter().any(|(_, kind, _)| *kind == "usage_without_publication");
        assert_eq!(unqueued, !is_restored, "{report:?}");
        assert_eq!(number(&report, LOG, "accepted"), 5);
    }
}

#[tokio::test]
async fn an_audit_reports_its_progress_in_coderds_rows() {
    let site = Site::new().await;
    // more than one slice
    let many = "insert into usage_events (id, event_type, event_data, created_at)
         select 'more-' || n, 'dc_managed_agents_v1', '{\"count\": 1}', now() from generate_series(1, 10001) n";
    sqlx::query(many).execute(&site.coderd.database.pool).await.unwrap();
    let steps = Mutex::new(Vec::new());
    let report = |phase, done, total| steps.lock().unwrap().push((phase, done, total));
    site.whole_audit().run_from(true, &report).await.unwrap();
    let steps = steps.into_inner().unwrap();
    let of_source: Vec<_> =
        steps.iter().filter(|(phase, _, _)| *phase == AuditPhase::Source).collect();
    assert_eq!(of_source.len(), 1, "{steps:?}");
    let (_, done, total) = of_source[0];
    assert!(*done >= 10_000 && total >= done, "{steps:?}");
}
