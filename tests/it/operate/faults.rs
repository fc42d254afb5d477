//! Faults under load: every record is counted once despite cuts, freezes and kills.

use std::time::Duration;

use tallyline::event::Topic;
use tallyline::log::Log;

use super::proxy::{self, Proxy};
use super::{Kind, SOON, Site, append_builds, messages};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, usage};

const EVENTS: u32 = 20_000;
/// One event in ten is usage.
const USAGE: u32 = EVENTS / 10;
const BUILDS: u32 = EVENTS - USAGE;

async fn append_events(log: &Log) {
    for part in 0..20 {
        append_builds(log, part * BUILDS / 20..(part + 1) * BUILDS / 20).await;
        let usage =
            messages((part * USAGE / 20..(part + 1) * USAGE / 20).map(|n| usage(DEPLOYMENT, n)));
        log.append(Topic::AgentUsage, usage).await.unwrap();
    }
}

/// Checks that everything is in the ledger once, and that the books of log and ledger balance.
async fn all_is_recorded_once(site: &Site) {
    site.builds(i64::from(BUILDS)).await;
    eventually(SOON, "usage is in the ledger", || async {
        site.count("select count(*) from usage_event").await >= i64::from(USAGE)
    })
    .await;
    let numbers = site.balanced().await;
    for (name, expected) in [
        ("accepted", EVENTS),
        ("records", EVENTS),
        ("duplicates", 0),
        ("conflicts", 0),
        ("rejects", 0),
        ("held", 0),
    ] {
        assert_eq!(numbers[name], expected, "{name}: {numbers}");
    }
    let counted = |query| site.count(query);
    assert_eq!(counted("select count(*) from workspace_build").await, i64::from(BUILDS));
    assert_eq!(counted("select count(*) from publication").await, i64::from(USAGE));
    assert_eq!(counted("select sum(accepted)::bigint from batch").await, i64::from(EVENTS));
}

/// Cuts all connections `times` times in the middle of the server's bytes.
async fn cut_repeatedly(proxy: &Proxy, times: u32, bytes: u64) {
    for _ in 0..times {
        proxy.cut_after(bytes);
        let what = "so much was sent that the connections were cut";
        if tokio::time::timeout(Duration::from_secs(20), async {
            eventually(SOON, what, || async { proxy.has_cut() }).await
        })
        .await
        .is_err()
        {
            proxy.cut();
        }
    }
}

#[tokio::test]
async fn postgres_connections_cut_under_load_lose_and_double_nothing() {
    for kind in [Kind::Postgres, Kind::Kafka] {
        let mut site = Site::registered(kind).await;
        append_events(&site.log()).await;
        let (mut proxy, url) = Proxy::to_database(&site.ledger.url);
        proxy.open().await;
        site.set("ledger.url", &format!("'{url}'"));
        let mut running = site.start("");
        running.says(&["partitions assigned"]).await;
        cut_repeatedly(&proxy, 8, 20_000).await;
        all_is_recorded_once(&site).await;
        running.ready().await;
        assert!(
            !running.process.stderr().contains("partition stopped"),
            "{}",
            running.process.stderr()
        );
        running.ends_in_order().await;
    }
}

#[tokio::test]
async fn kafka_cut_and_frozen_under_load_loses_and_doubles_nothing() {
    let mut site = Site::registered(Kind::Kafka).await;
    append_events(&site.log()).await;
    let (_turn, mut proxy) = proxy::kafka().await;
    proxy.open().await;
    site.set("kafka.brokers", &format!("'{}'", proxy.address));
    let mut running = site.start("");
    running.says(&["partitions assigned"]).await;
    cut_repeatedly(&proxy, 4, 200_000).await;
    proxy.freeze();
    // longer than the group waits: the group considers the member dead
    running.not_ready("log", &["Kafka at"]).await;
    proxy.thaw();
    all_is_recorded_once(&site).await;
    running.ready().await;
    assert!(
        !running.process.stderr().contains("partition stopped"),
        "{}",
        running.process.stderr()
    );
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_consumer_that_is_killed_under_load_is_replaced_on_postgres() {
    a_killed_consumer_is_replaced(Kind::Postgres).await;
}

#[tokio::test]
async fn a_consumer_that_is_killed_under_load_is_replaced_on_kafka() {
    a_killed_consumer_is_replaced(Kind::Kafka).await;
}

async fn a_killed_consumer_is_replaced(kind: Kind) {
    let site = Site::registered(kind).await;
    let (mut one, mut other) = (site.start("--role consume"), site.start("--role consume"));
    let log = site.log();
    let killing = async {
        // both have partitions
        one.says(&["partitions assigned"]).await;
        other.says(&["partitions assigned"]).await;
        site.builds(500).await;
        one.process.kill();
    };
    tokio::join!(append_events(&log), killing);
    all_is_recorded_once(&site).await;
    other.ends_in_order().await;
}

#[tokio::test]
async fn a_consumer_that_was_frozen_and_comes_back_writes_nothing_twice() {
    for kind in [Kind::Postgres, Kind::Kafka] {
        let site = Site::registered(kind).await;
        let (mut one, mut other) = (site.start("--role consume"), site.start("--role consume"));
        let log = site.log();
        let freezing = async {
            one.says(&["partitions assigned"]).await;
            other.says(&["partitions assigned"]).await;
            site.builds(500).await;
            one.process.pause();
        };
        tokio::join!(append_events(&log), freezing);
        site.builds(i64::from(BUILDS)).await;
        one.process.resume();
        all_is_recorded_once(&site).await;
        one.ends_in_order().await;
        other.ends_in_order().await;
    }
}
