//! Alive, ready, and for whom.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tallyline::api::{ServeError, ServeSettings, Server, Token};
use tallyline::coderd;
use tallyline::config::Scope;
use tallyline::event::Topic;
use tallyline::ledger::{Ledger, LedgerSettings};
use tokio_util::sync::CancellationToken;

use super::{Process, SOON, Site, fold, get, settings};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, partition};
use crate::support::ports::free_port;

/// An address at which nothing answers.
fn nowhere() -> String {
    format!("postgres://nobody@127.0.0.1:{}/nothing", free_port())
}

async fn ready(process: &Process) -> (u16, Value) {
    let (status, body) = process.get("/readyz").await;
    (status.as_u16(), body)
}

#[tokio::test]
async fn a_process_is_ready_once_all_it_needs_is_there() {
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    let stopped = Arc::new(Mutex::new(BTreeMap::new()));
    let source = coderd::Database::new(&site._database.url, Duration::from_secs(5)).unwrap();
    let process = site
        .process_with(|_, api| {
            api.stopped_partitions = Some(Arc::clone(&stopped));
            api.coderd = Some(source);
        })
        .await;
    eventually(SOON, "it is ready", || async { ready(&process).await.0 == 200 }).await;
    let (_, body) = ready(&process).await;
    let checks: Vec<&String> = body["checks"].as_object().unwrap().keys().collect();
    assert_eq!(checks, ["coderd", "ledger", "log", "metrics_lease", "partitions", "pauses", "projections"]);

    // A second process is ready although it does not hold the lease, and says who does.
    let second = site.process().await;
    eventually(SOON, "the second is ready, too", || async { ready(&second).await.0 == 200 }).await;
    assert!(ready(&second).await.1["checks"]["metrics_lease"]["why"].as_str().unwrap().starts_with("held by "));

    stopped.lock().unwrap().insert(partition(Topic::AgentUsage, 3), "the log was recreated".to_owned());
    let (status, body) = ready(&process).await;
    assert_eq!((status, &body["ready"]), (503, &json!(false)));
    let why = body["checks"]["partitions"]["why"].as_str().unwrap();
    assert!(why.contains("tallyline.agent-usage.v1/3") && why.contains("the log was recreated"), "{why}");
    // On both listeners.
    assert_eq!(get(&format!("{}/readyz", process.metrics)).await.0, 503);
    assert_eq!(get(&format!("{}/healthz", process.metrics)).await.0, 200);
}

#[tokio::test]
async fn what_is_missing_is_named_while_the_process_is_alive() {
    let site = Site::new().await;
    let lost = Ledger::open(&LedgerSettings { url: nowhere(), connections: 2 }, site.ledger.clock.clone()).unwrap();
    let source = coderd::Database::new(&nowhere(), Duration::from_secs(5)).unwrap();
    let process = site
        .process_with(|_, api| {
            let folds = CancellationToken::new();
            (api.metrics, api.licenses) = (fold(&lost, &folds), fold(&lost, &folds));
            api.log = tallyline::log::Log::postgres(lost.pool.clone(), tallyline::log::PostgresLogSettings::default());
            api.ledger = lost;
            api.coderd = Some(source);
        })
        .await;
    let (status, body) = ready(&process).await;
    assert_eq!(status, 503);
    for name in ["ledger", "log", "coderd", "projections", "metrics_lease"] {
        let check = &body["checks"][name];
        assert!(check["ok"] == json!(false) && !check["why"].as_str().unwrap().is_empty(), "{name}: {body}");
    }
    assert_eq!(process.get("/healthz").await, (reqwest::StatusCode::OK, json!({"alive": true})));
    let (status, problem) = process.get("/api/v2/entitlements").await;
    assert_eq!((status.as_u16(), problem["message"].is_string()), (503, true), "{problem}");
    assert!(process.domain("").await.is_empty());
    process.end().await;
}

#[tokio::test]
async fn a_token_is_demanded_where_one_is_set() {
    let site = Site::new().await;
    let process = site.process_with(|settings, _| settings.tokens = vec![Token::new("grafana", Scope::Read, "the token")].into()).await;
    let client = reqwest::Client::new();
    for url in [format!("{}/api/v1/status", process.api), format!("{}/metrics", process.metrics), format!("{}/nowhere", process.api)] {
        let without = client.get(&url).send().await.unwrap();
        assert_eq!((without.status().as_u16(), without.headers()["www-authenticate"].to_str().unwrap()), (401, "Bearer"));
        assert!(without.json::<Value>().await.unwrap()["message"].is_string());
        assert_eq!(client.get(&url).bearer_auth("another").send().await.unwrap().status(), 401);
        assert_ne!(client.get(&url).bearer_auth("the token").send().await.unwrap().status(), 401);
    }
    assert_eq!(get(&format!("{}/healthz", process.api)).await.0, 200);
}

#[tokio::test]
async fn nothing_listens_beyond_loopback_or_twice_on_an_address() {
    let site = Site::new().await;
    let folds = CancellationToken::new();
    let api = || site.api(&site.ledger, fold(&site.ledger, &folds), fold(&site.ledger, &folds));
    let open = ([0, 0, 0, 0], 0).into();
    let refused = Server::bind(ServeSettings { api_listen: open, ..settings() }, api()).await;
    assert!(matches!(refused, Err(ServeError::NoToken { key: "serve.api_listen", .. })));
    let tokens: tallyline::api::Tokens = vec![Token::new("a", Scope::Admin, "t")].into();
    let refused = Server::bind(ServeSettings { metrics_listen: open, tokens, ..settings() }, api()).await;
    assert!(matches!(refused, Err(ServeError::NoTls { key: "serve.metrics_listen", .. })));

    let first = Server::bind(settings(), api()).await.unwrap();
    let metrics_listen = first.metrics_address().unwrap();
    assert!(matches!(Server::bind(ServeSettings { metrics_listen, ..settings() }, api()).await, Err(ServeError::Listen { .. })));
    folds.cancel();
}

#[tokio::test]
async fn pages_are_compressed_in_both_formats() {
    let site = Site::new().await;
    let process = site.process().await;
    let protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
    for (accept, content_type) in [(protobuf, "application/vnd.google.protobuf"), ("*/*", "text/plain; version=0.0.4; charset=utf-8")] {
        let ask = |encoding: &str| {
            reqwest::Client::new()
                .get(format!("{}/metrics", process.metrics))
                .header("accept", accept)
                .header("accept-encoding", encoding)
                .send()
        };
        let (plain, packed) = (ask("identity").await.unwrap(), ask("gzip").await.unwrap());
        for answer in [&plain, &packed] {
            assert!(answer.headers()["content-type"].to_str().unwrap().starts_with(content_type), "{:?}", answer.headers());
        }
        assert_eq!(packed.headers()["content-encoding"], "gzip");
        let (plain, packed) = (plain.bytes().await.unwrap(), packed.bytes().await.unwrap());
        assert!(packed.starts_with(&[0x1f, 0x8b]) && packed.len() < plain.len(), "{} of {}", packed.len(), plain.len());
    }
}
