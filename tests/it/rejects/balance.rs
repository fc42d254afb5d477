//! Acts on rejects are in the books: the audit reports each row of coderd, and the collector
//! appends nothing twice.

use std::time::Duration;

use chrono::TimeDelta;
use serde_json::json;
use tallyline::audit::{Audit, AuditReport};
use tallyline::clock::Clock;
use tallyline::coderd;
use tallyline::collectors::{Collector, Settings};
use tallyline::license::PublicKeys;
use tallyline::operations::{DiscardRejects, Resubmit};
use tallyline_sim::coderd::SchemaVersion;

use super::{Backend, Site, operator, with};
use crate::support::coderd::Coderd;
use crate::support::ledger::act;

/// A pass of a collector without memory: it reads all rows again.
async fn fresh_pass(coderd: &Coderd, site: &Site) -> i32 {
    let settings = Settings {
        margin: TimeDelta::zero(),
        deployment_id: Some(coderd.deployment),
        ..Settings::new("test")
    };
    let (log, ledger) = (site.operations.log.clone(), site.operations.ledger.clone());
    let opened =
        Collector::open(settings, source(coderd), PublicKeys::new(), log, ledger, Clock::system())
            .await;
    let usage = opened.unwrap().expect("the source is free").pass().await.unwrap().usage;
    site.consume().await;
    usage
}

fn source(coderd: &Coderd) -> coderd::Database {
    coderd::Database::new(&coderd.database.url, Duration::from_secs(30)).unwrap()
}

async fn audit(coderd: &Coderd, site: &Site) -> AuditReport {
    let source = Some((source(coderd), coderd.deployment));
    let (ledger, log) = (site.operations.ledger.clone(), site.operations.log.clone());
    Audit { ledger, log, source, patience: Duration::ZERO }.run().await.unwrap()
}

/// Whether everything balances, and kind and id of differences, open work and remarks.
fn row_kinds(report: &AuditReport) -> (bool, Vec<(&str, &str)>) {
    let rows = report
        .joints
        .iter()
        .flat_map(|joint| joint.differences.iter().chain(&joint.open).chain(&joint.remarks));
    (report.balanced, rows.map(|row| (&*row.kind, row.id.as_str())).collect())
}

#[tokio::test]
async fn the_audit_shows_the_outcome_of_acts_on_refused_rows() {
    let (coderd, site) =
        (Coderd::new(SchemaVersion::Sep2026).await, Site::new(Backend::Postgres).await);
    let now = coderd.now().await;
    for id in ["usage-1", "usage-2"] {
        coderd.usage(id, "dc_managed_agents_v1", json!({"count": 0}), now).await;
    }
    assert_eq!(fresh_pass(&coderd, &site).await, 2);
    assert_eq!(
        row_kinds(&audit(&coderd, &site).await),
        (true, vec![("rejected", "usage-1"), ("rejected", "usage-2")])
    );

    let [first, second] = site.list("open").await.try_into().unwrap();
    act(&site.operations, &DiscardRejects { ids: vec![second.id] }, &operator()).await.unwrap();
    site.resubmit(with(first.id, r#"{"count": 1}"#)).await.unwrap();
    // in flight, it is neither accepted nor open
    let report = audit(&coderd, &site).await;
    assert_eq!(
        row_kinds(&report),
        (false, vec![("resubmitted", "usage-1"), ("discarded", "usage-2")])
    );
    assert_eq!(site.consume().await.accepted, 1);
    let end = (true, vec![("mended", "usage-1"), ("discarded", "usage-2")]);
    assert_eq!(row_kinds(&audit(&coderd, &site).await), end);

    // none of them is appended again unchanged
    assert_eq!(fresh_pass(&coderd, &site).await, 0);
    assert_eq!(row_kinds(&audit(&coderd, &site).await), end);
    // a row that coderd has corrected is another one than the discarded reject
    let right = "update usage_events set event_data = '{\"count\": 4}' where id = 'usage-2'";
    sqlx::query(right).execute(&coderd.database.pool).await.unwrap();
    assert_eq!(fresh_pass(&coderd, &site).await, 1);
    assert_eq!(row_kinds(&audit(&coderd, &site).await), (true, vec![("mended", "usage-1")]));
}

#[tokio::test]
async fn a_resubmission_that_is_refused_again_is_open_again() {
    let (coderd, site) =
        (Coderd::new(SchemaVersion::Sep2026).await, Site::new(Backend::Postgres).await);
    coderd.usage("usage-1", "dc_managed_agents_v1", json!({"count": 0}), coderd.now().await).await;
    fresh_pass(&coderd, &site).await;
    let id = site.list("open").await[0].id;
    site.resubmit(Resubmit { force: true, ..super::as_is(&[id]) }).await.unwrap();
    assert_eq!(site.consume().await.rejects, 1);
    assert_eq!(row_kinds(&audit(&coderd, &site).await), (true, vec![("rejected", "usage-1")]));
    let id = site.list("open").await[0].id;
    act(&site.operations, &DiscardRejects { ids: vec![id] }, &operator()).await.unwrap();
    assert_eq!(row_kinds(&audit(&coderd, &site).await), (true, vec![("discarded", "usage-1")]));
}
