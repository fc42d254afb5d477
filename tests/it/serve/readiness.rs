//! Whether a process is alive and ready, and which requests it answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tallyline::api::{ServeError, ServeSettings, Server, Token};
use tallyline::coderd;
use tallyline::config::Scope;
use tallyline::event::Topic;
use tallyline::ledger::{Ledger, LedgerSettings};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::{Process, SOON, Site, fold, get, settings};
use crate::operate::proxy::Proxy;
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, partition};
use crate::support::ports::free_port;

/// An address without a server.
fn nowhere() -> String {
    format!("postgres://unknown@127.0.0.1:{}/nothing", free_port())
}

async fn ready(process: &Process) -> (u16, Value) {
    let (status, body) = process.get("/readyz").await;
    (status.as_u16(), body)
}

#[tokio::test]
async fn a_process_is_ready_once_its_dependencies_are() {
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    let stopped = Arc::new(Mutex::new(BTreeMap::new()));
    let source = coderd::Database::new(&site._database.url, Duration::from_secs(5)).unwrap();
    let process = site
        .process_with(|_, api| {
            api.own.stopped_partitions = Some(Arc::clone(&stopped));
            api.own.coderd = Some(source);
        })
        .await;
    eventually(SOON, "the process is ready", || async { ready(&process).await.0 == 200 }).await;
    let (_, body) = ready(&process).await;
    let checks: Vec<&String> = body["checks"].as_object().unwrap().keys().collect();
    assert_eq!(
        checks,
        ["coderd", "ledger", "log", "metrics_lease", "partitions", "pauses", "projections"]
    );

    // A second process is ready without the lease, and names its holder.
    let second = site.process().await;
    eventually(SOON, "the second is ready, too", || async { ready(&second).await.0 == 200 }).await;
    assert!(
        ready(&second).await.1["checks"]["metrics_lease"]["why"]
            .as_str()
            .unwrap()
            .starts_with("held by ")
    );

    stopped
        .lock()
        .unwrap()
        .insert(partition(Topic::AgentUsage, 3), "the log was recreated".to_owned());
    let (status, body) = ready(&process).await;
    assert_eq!((status, &body["ready"]), (503, &json!(false)));
    let why = body["checks"]["partitions"]["why"].as_str().unwrap();
    assert!(
        why.contains("tallyline.agent-usage.v1/3") && why.contains("the log was recreated"),
        "{why}"
    );
    // On both listeners.
    assert_eq!(get(&format!("{}/readyz", process.metrics)).await.0, 503);
    assert_eq!(get(&format!("{}/healthz", process.metrics)).await.0, 200);
}

#[tokio::test]
async fn many_callers_of_readyz_open_no_connections_of_their_own() {
    const CALLERS: usize = 250;
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    let (mut proxy, url) = Proxy::to_database(&site._database.url);
    proxy.open().await;
    let through = Ledger::open(
        &LedgerSettings { url: url.clone(), connections: 4 },
        site.ledger.clock.clone(),
    )
    .unwrap();
    let source = coderd::Database::new(&url, Duration::from_secs(5)).unwrap();
    let process = site
        .process_with(|_, api| {
            let folds = CancellationToken::new();
            (api.metrics, api.licenses) = (fold(&through, &folds), fold(&through, &folds));
            api.own.log = tallyline::log::Log::postgres(
                through.pool.clone(),
                tallyline::log::PostgresLogSettings::default(),
            );
            api.own.ledger = through;
            api.own.coderd = Some(source);
        })
        .await;
    eventually(SOON, "the process is ready", || async { ready(&process).await.0 == 200 }).await;

    let before = proxy.accepted();
    let client = reqwest::Client::new();
    let url = format!("{}/readyz", process.api);
    let calls = (0..CALLERS).map(|_| client.get(&url).send());
    for answer in futures::future::join_all(calls).await {
        assert_eq!(answer.unwrap().status().as_u16(), 200);
    }
    // the pool has at most 4 connections, and coderd's is one
    let opened = proxy.accepted() - before;
    assert!(opened <= 5, "{CALLERS} callers opened {opened} connections");

    // a shared answer does not hide a missing dependency for long
    proxy.close();
    eventually(SOON, "it is not ready any more", || async { ready(&process).await.0 == 503 }).await;
    process.end().await;
}

#[tokio::test]
async fn a_missing_dependency_is_named_while_the_process_runs() {
    let site = Site::new().await;
    let lost =
        Ledger::open(&LedgerSettings { url: nowhere(), connections: 2 }, site.ledger.clock.clone())
            .unwrap();
    let source = coderd::Database::new(&nowhere(), Duration::from_secs(5)).unwrap();
    let process = site
        .process_with(|_, api| {
            let folds = CancellationToken::new();
            (api.metrics, api.licenses) = (fold(&lost, &folds), fold(&lost, &folds));
            api.own.log = tallyline::log::Log::postgres(
                lost.pool.clone(),
                tallyline::log::PostgresLogSettings::default(),
            );
            api.own.ledger = lost;
            api.own.coderd = Some(source);
        })
        .await;
    let (status, body) = ready(&process).await;
    assert_eq!(status, 503);
    for name in ["ledger", "log", "coderd", "projections", "metrics_lease"] {
        let check = &body["checks"][name];
        assert!(
            check["ok"] == json!(false) && !check["why"].as_str().unwrap().is_empty(),
            "{name}: {body}"
        );
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
    let process = site
        .process_with(|settings, _| {
            settings.tokens = vec![Token::new("grafana", Scope::Read, "the token")].into()
        })
        .await;
    let client = reqwest::Client::new();
    for url in [
        format!("{}/api/v1/status", process.api),
        format!("{}/metrics", process.metrics),
        format!("{}/nowhere", process.api),
    ] {
        let without = client.get(&url).send().await.unwrap();
        assert_eq!(
            (without.status().as_u16(), without.headers()["www-authenticate"].to_str().unwrap()),
            (401, "Bearer")
        );
        assert!(without.json::<Value>().await.unwrap()["message"].is_string());
        assert_eq!(client.get(&url).bearer_auth("another").send().await.unwrap().status(), 401);
        assert_ne!(client.get(&url).bearer_auth("the token").send().await.unwrap().status(), 401);
    }
    assert_eq!(get(&format!("{}/healthz", process.api)).await.0, 200);
}

#[tokio::test]
async fn a_page_of_another_origin_gets_nothing_without_tokens() {
    let site = Site::new().await;
    let process = site
        .process_with(|settings, _| settings.host_names = vec!["tallyline.example.com".to_owned()])
        .await;
    let client = reqwest::Client::new();
    let ask = async |url: &str, host: &str| {
        let answer = client.get(url).header("host", host).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let api = [
        "/api/v1/status",
        "/api/v2/entitlements",
        "/openapi.json",
        "/healthz",
        "/readyz",
        "/nowhere",
    ]
    .map(|path| format!("{}{path}", process.api));
    let metrics =
        ["/metrics", "/healthz", "/readyz"].map(|path| format!("{}{path}", process.metrics));
    for url in api.iter().chain(&metrics) {
        for host in ["evil.example", "evil.example:8090", "localhost.evil.example"] {
            let (status, body) = ask(url, host).await;
            assert!(
                status == 403
                    && body.contains("the header Host")
                    && body.contains("serve.host_names"),
                "{url} as {host}: {status} {body}"
            );
        }
        for host in [
            "localhost",
            "127.0.0.1:8090",
            "[::1]:8090",
            "tallyline.example.com",
            "tallyline.example.com:443",
        ] {
            assert_ne!(ask(url, host).await.0, 403, "{url} as {host}");
        }
        // a probe or Prometheus through a proxy uses the pod's address
        let by_address =
            url.ends_with("/healthz") || url.ends_with("/readyz") || url.ends_with("/metrics");
        assert_eq!(ask(url, "10.1.2.3:8090").await.0 != 403, by_address, "{url}");
    }
    // HTTP/1.0 needs no header Host
    let address = process.api.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /api/v1/status HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.0 403") && answer.contains("must be there once"),
        "{answer}"
    );

    // if tokens are set, they decide, and no page has one
    let guarded = site
        .process_with(|settings, _| {
            settings.tokens = vec![Token::new("a", Scope::Read, "t")].into()
        })
        .await;
    let behind_a_proxy = client
        .get(format!("{}/api/v1/audit-log", guarded.api))
        .header("host", "any.example")
        .bearer_auth("t")
        .send()
        .await;
    assert_eq!(behind_a_proxy.unwrap().status().as_u16(), 200);
}

#[tokio::test]
async fn nothing_listens_beyond_loopback_or_twice_on_an_address() {
    let site = Site::new().await;
    let folds = CancellationToken::new();
    let api = || site.api(&site.ledger, fold(&site.ledger, &folds), fold(&site.ledger, &folds));
    let open = ([0, 0, 0, 0], 0).into();
    let refused = Server::bind(ServeSettings { api_listen: open, ..settings() }, api()).await;
    assert!(matches!(refused, Err(ServeError::NoTls { key: "serve.api_listen", .. })));
    let tokens = vec![Token::new("a", Scope::Admin, "t")].into();
    let refused =
        Server::bind(ServeSettings { metrics_listen: open, tokens, ..settings() }, api()).await;
    assert!(matches!(refused, Err(ServeError::NoTls { key: "serve.metrics_listen", .. })));

    let first = Server::bind(settings(), api()).await.unwrap();
    let metrics_listen = first.metrics_address().unwrap();
    assert!(matches!(
        Server::bind(ServeSettings { metrics_listen, ..settings() }, api()).await,
        Err(ServeError::Listen { .. })
    ));
    folds.cancel();
}

#[tokio::test]
async fn pages_are_compressed_in_both_formats() {
    let site = Site::new().await;
    let process = site.process().await;
    let protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
    for (accept, content_type) in [
        (protobuf, "application/vnd.google.protobuf"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
    ] {
        let ask = |encoding: &str| {
            reqwest::Client::new()
                .get(format!("{}/metrics", process.metrics))
                .header("accept", accept)
                .header("accept-encoding", encoding)
                .send()
        };
        let (plain, packed) = (ask("identity").await.unwrap(), ask("gzip").await.unwrap());
        for answer in [&plain, &packed] {
            assert!(
                answer.headers()["content-type"].to_str().unwrap().starts_with(content_type),
                "{:?}",
                answer.headers()
            );
        }
        assert_eq!(packed.headers()["content-encoding"], "gzip");
        let (plain, packed) = (plain.bytes().await.unwrap(), packed.bytes().await.unwrap());
        assert!(
            packed.starts_with(&[0x1f, 0x8b]) && packed.len() < plain.len(),
            "{} of {}",
            packed.len(),
            plain.len()
        );
    }
}
