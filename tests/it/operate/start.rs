//! Missing dependencies at the start are logged and retried.

use reqwest::StatusCode;
use serde_json::json;
use tallyline::clock::Clock;
use tallyline_sim::tallyman::{Config, Tallyman};
use tokio_util::sync::CancellationToken;

use super::proxy::{self, Proxy};
use super::{Kind, SOON, Site};
use crate::support::eventually;

#[tokio::test]
async fn an_unreachable_ledger_is_named_and_retried() {
    let mut site = Site::new(Kind::Postgres).await;
    let (mut proxy, url) = Proxy::to_database(&site.ledger.url);
    site.set("ledger.url", &format!("'{url}'"));
    let mut running = site.start("");
    running.not_ready("ledger", &[&proxy.address.to_string()]).await;
    let line = running
        .says(&["the ledger's PostgreSQL", &proxy.address.to_string(), "is it started", "waiting"])
        .await;
    assert!(line.contains(&site.ledger.name), "{line}");
    proxy.open().await;
    running.ready().await;
    running.says(&["reached", "ledger"]).await;
    assert!(!running.process.stderr().contains("hunter2"));
    running.ends_in_order().await;
}

#[tokio::test]
async fn an_unresponsive_ledger_is_named_and_retried() {
    let mut site = Site::new(Kind::Postgres).await;
    let (mut proxy, url) = Proxy::to_database(&site.ledger.url);
    site.set("ledger.url", &format!("'{url}'"));
    proxy.freeze();
    proxy.open().await;
    let mut running = site.start("");
    running.not_ready("ledger", &[&proxy.address.to_string()]).await;
    running
        .says(&[
            "the ledger's PostgreSQL",
            &proxy.address.to_string(),
            "no answer within",
            "waiting",
        ])
        .await;
    proxy.thaw();
    running.ready().await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_ledger_without_migrations_is_reported_and_retried() {
    let site = Site::bare(Kind::Postgres).await;
    let mut running = site.start("");
    running.not_ready("ledger", &["run `tallyline migrate`"]).await;
    running.says(&["run `tallyline migrate`", "waiting"]).await;
    site.migrate().await;
    running.ready().await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn missing_topics_are_reported_and_retried() {
    let mut site = Site::new(Kind::Postgres).await;
    let mut other = Site::bare(Kind::Kafka).await;
    // the ledger is migrated, the topics are not created
    other.set("ledger.url", &format!("'{}'", site.ledger.url));
    std::mem::swap(&mut other.ledger, &mut site.ledger);
    let mut running = other.start("");
    running
        .not_ready("log", &["Kafka at", "tallyline.workspace-builds.v1", "does not exist"])
        .await;
    running.says(&["Kafka at", "run `tallyline migrate`", "waiting"]).await;
    other.migrate().await;
    running.ready().await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn an_unreachable_kafka_is_named_and_retried() {
    let mut site = Site::new(Kind::Kafka).await;
    let (_turn, mut proxy) = proxy::kafka().await;
    site.set("kafka.brokers", &format!("'{}'", proxy.address));
    let mut running = site.start("");
    running.not_ready("log", &["Kafka at", &proxy.address.to_string()]).await;
    running.says(&["Kafka at", &proxy.address.to_string(), "waiting"]).await;
    proxy.open().await;
    running.ready().await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn an_unreachable_coderd_is_named_and_retried() {
    let mut site = Site::new(Kind::Postgres).await;
    let coderd = site.with_coderd().await;
    let (mut proxy, url) = Proxy::to_database(&coderd.database.url);
    site.set("source.coderd_url", &format!("'{url}'"));
    site.set("roles", "['collect', 'consume', 'publish', 'serve']");
    let mut running = site.start("");
    running.not_ready("coderd", &[&proxy.address.to_string(), "check that the server runs"]).await;
    running.says(&["coderd's database at", &proxy.address.to_string(), "waiting"]).await;
    proxy.open().await;
    running.ready().await;
    site.builds(120).await;
    assert!(!running.process.stderr().contains("hunter2"));
    running.ends_in_order().await;
}

#[tokio::test]
async fn an_unreachable_tallyman_is_named_and_retried() {
    let mut site = Site::new(Kind::Postgres).await;
    let _coderd = site.with_coderd().await;
    let stop = CancellationToken::new();
    let tallyman = Tallyman::start(Config::default(), Clock::system(), stop.clone()).await.unwrap();
    let mut proxy = Proxy::to(&tallyman.addr.to_string());
    site.set("roles", "['collect', 'consume', 'publish', 'serve']");
    site.set("publish.mode", "'sole'");
    site.set("publish.url", &format!("'http://{}/api/v1/events/ingest'", proxy.address));
    let mut running = site.start("");
    running
        .not_ready("publisher", &["Tallyman at", &proxy.address.to_string(), "check publish.url"])
        .await;
    running
        .says(&["Tallyman at", &proxy.address.to_string(), "cannot be reached", "waiting"])
        .await;
    // it wrote down no request that would stay unanswered
    assert_eq!(site.count("select count(*) from publication_request").await, 0);
    proxy.open().await;
    running.ready().await;
    eventually(SOON, "usage is billed", || async { !tallyman.books().billed.is_empty() }).await;
    let (status, body) = running.get("/readyz").await;
    assert_eq!(
        (status, &body["checks"]["publisher"]["ok"]),
        (StatusCode::OK, &json!(true)),
        "{body}"
    );
    running.ends_in_order().await;
    stop.cancel();
    tallyman.stopped().await.unwrap();
}
