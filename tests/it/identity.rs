//! A second pipeline with a mistyped deployment id, beside the first one, on real processes.
//! Nothing is billed twice.

use std::time::Duration;
use tallyline::ledger::sources;

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline_sim::coderd::{Config, SchemaVersion, Simulation};
use tallyline_sim::tallyman::{self, Tallyman};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::journey::simulated::{introduction, pipeline};
use crate::journey::site::{Backend, Site};
use crate::support::{database, eventually};

const SOON: Duration = Duration::from_secs(120);
const PACE: &str = "collect.poll_seconds = 0.5\ncollect.margin_seconds = 0\n";

#[tokio::test]
async fn a_second_pipeline_with_a_mistyped_deployment_id_bills_nothing() {
    let (coderd, stop) = (database().await, CancellationToken::new());
    let end = Clock::system().now() - TimeDelta::minutes(5);
    let config = Config::history(3, SchemaVersion::Sep2026, end - TimeDelta::days(20), end, 300);
    let mut simulation = Simulation::start(config, &coderd.url).await.unwrap();
    simulation.finish().await.unwrap();
    let (own, mistyped) = (simulation.deployment().id, Uuid::from_u128(0xbad));
    // the vendor knows both ids: only Tallyline can prevent it
    let config = tallyman::Config {
        license_keys: simulation
            .truth()
            .licenses
            .iter()
            .map(|license| license.jwt.clone())
            .collect(),
        deployment_ids: vec![own, mistyped],
        ..tallyman::Config::default()
    };
    let vendor = Tallyman::start(config, Clock::system(), stop.clone()).await.unwrap();
    let introduced_at = introduction(&simulation, end - TimeDelta::days(10));
    let site =
        Site::new(Backend::Postgres, &pipeline(&coderd, &simulation, &vendor, introduced_at, PACE))
            .await;
    let roles = ["--role", "consume", "--role", "publish"];
    let first = site.start("collect", &roles);
    let pending = async || -> i64 {
        let query = "select count(*) from publication where state = 'pending'";
        sqlx::query_scalar(query).fetch_one(&site.database.pool).await.unwrap()
    };
    eventually(SOON, "every event is billed", async || {
        !vendor.books().billed.is_empty() && site.has_read_all().await && pending().await == 0
    })
    .await;
    let (billed, accepted) = (vendor.books().billed.len(), site.accepted().await);

    let set = format!("source.deployment_id={mistyped}");
    let second = site.start("collect", &[&roles[..], &["--set", &set]].concat());
    let named =
        format!("source.deployment_id {mistyped} is not the id of this coderd: set it to {own}");
    eventually(SOON, "the collector refuses", async || second.stderr().contains(&named)).await;
    // the first goes on beside it
    let passes = async || -> i64 {
        sqlx::query_scalar("select pass_id from collector_progress")
            .fetch_one(&site.database.pool)
            .await
            .unwrap()
    };
    let before = passes().await;
    eventually(SOON, "the first goes on", async || passes().await > before + 3).await;
    assert!(
        vendor.books().billed.iter().all(|billed| billed.times == 1 && billed.deployment_id == own)
    );
    assert_eq!(
        (
            vendor.books().billed.len(),
            site.accepted().await,
            site.ledger.run(sources::list).await.unwrap().len()
        ),
        (billed, accepted, 1)
    );
    // rows of the other id in the ledger, left by a collector of an earlier version, are not sent
    // either
    site.ledger
        .run(async |conn| {
            sources::register(conn, mistyped, introduced_at, None, site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    let other = format!("which is source {own} of this ledger");
    eventually(SOON, "the publisher refuses, too", async || {
        let output = second.stderr();
        output.contains("refused: ") && output.contains(&other)
    })
    .await;
    assert_eq!(vendor.books().billed.len(), billed);
    drop(first);
}
