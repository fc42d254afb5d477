//! SIGTERM: unfinished batches end or are dropped, leases are released, snapshots are saved, and
//! the exit code is 0.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tallyline::clock::Clock;
use tallyline_sim::tallyman::{Config, Switches, Tallyman};
use tokio_util::sync::CancellationToken;

use super::proxy::{self, Proxy};
use super::{GRACE, Kind, LEEWAY, Running, SOON, Site, append_builds};
use crate::support::eventually;

/// A role, and the log line of a working process.
const ROLES: [(&str, &[&str]); 4] = [
    ("collect", &["\"message\":\"collecting\""]),
    ("consume", &["partitions assigned"]),
    ("publish", &["\"message\":\"publisher\"", "working"]),
    ("serve", &["fold begins", "licenses"]),
];

#[tokio::test]
async fn every_combination_of_roles_ends_in_order_on_postgres() {
    every_combination_ends_in_order(Kind::Postgres).await;
}

#[tokio::test]
async fn every_combination_of_roles_ends_in_order_on_kafka() {
    every_combination_ends_in_order(Kind::Kafka).await;
}

/// Records keep coming, so that each process has unfinished work.
async fn every_combination_ends_in_order(kind: Kind) {
    let mut site = Site::registered(kind).await;
    let _coderd = site.with_coderd().await;
    let stop = CancellationToken::new();
    let tallyman = Tallyman::start(Config::default(), Clock::system(), stop.clone()).await.unwrap();
    site.set("publish.mode", "'sole'");
    site.set("publish.url", &format!("'{}'", tallyman.ingest_url()));
    // the source is known before the first publisher needs it
    let mut first = site.start("--role collect --role consume");
    site.builds(120).await;
    first.ends_in_order().await;

    let log = site.log();
    let appending = async {
        let mut appended = 0;
        while !stop.is_cancelled() {
            append_builds(&log, appended..appended + 50).await;
            appended += 50;
        }
        appended
    };
    let ending = async {
        for combination in 1..(1 << ROLES.len()) {
            let roles: Vec<_> = ROLES
                .iter()
                .enumerate()
                .filter(|(bit, _)| combination & (1 << bit) != 0)
                .map(|(_, role)| role)
                .collect();
            let words: Vec<String> =
                roles.iter().map(|(name, _)| format!("--role {name}")).collect();
            let mut running = site.start(&words.join(" "));
            join_all(roles.iter().map(|(_, words)| running.says(words))).await;
            let took = running.ends_in_order().await;
            assert!(took < GRACE, "{words:?}: {took:?}");
            assert!(
                running.process.stderr().contains("\"message\":\"stopped\""),
                "{words:?}: {}",
                running.process.stderr()
            );
            let leases =
                "select name from lease where expires_at > clock_timestamp() order by name";
            let leases: Vec<String> =
                sqlx::query_scalar(leases).fetch_all(&site.ledger.pool).await.unwrap();
            let leased = site
                .count("select count(*) from publication where leased_until > clock_timestamp()")
                .await;
            assert_eq!((leases, leased), (vec![], 0), "{words:?}");
        }
        stop.cancel();
    };
    let (appended, ()) = tokio::join!(appending, ending);
    let mut last = site.start("--role consume");
    site.builds(i64::from(appended) + 120).await;
    last.ends_in_order().await;
    let numbers = site.balanced().await;
    assert_eq!(
        (&numbers["conflicts"], &numbers["rejects"], &numbers["records_waiting_in_the_log"]),
        (&0.into(), &0.into(), &0.into())
    );
    tallyman.stopped().await.unwrap();
}

#[tokio::test]
async fn a_second_process_takes_over_at_once_and_goes_on_from_the_snapshot() {
    let mut site = Site::registered(Kind::Postgres).await;
    let _coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'serve']");
    let mut first = site.start("");
    site.builds(120).await;
    first.says(&["this process shows the domain series"]).await;
    let mut second = site.start("");
    second.ready().await;
    second.says(&["another process collects this source"]).await;
    assert!(!second.process.stderr().contains("this process shows the domain series"));

    first.ends_in_order().await;
    let begun = Instant::now();
    second.says(&["this process shows the domain series"]).await;
    second.says(&["\"message\":\"collecting\""]).await;
    // Both leases last 15 seconds or more: they were released.
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    second.ends_in_order().await;

    let snapshots: BTreeSet<(String, i64)> =
        sqlx::query_as("select stage, max(sequence) from snapshot group by stage")
            .fetch_all(&site.ledger.pool)
            .await
            .unwrap()
            .into_iter()
            .collect();
    let head = site.count("select next_sequence - 1 from ledger").await;
    assert_eq!(
        snapshots.iter().map(|(stage, _)| stage.as_str()).collect::<Vec<_>>(),
        ["licenses", "metrics"]
    );
    // the collector's last pass may have been recorded after it
    assert!(
        snapshots.iter().all(|(_, sequence)| (head - 20..=head).contains(sequence)),
        "{snapshots:?} of {head}"
    );
    let mut third = site.start("--role serve");
    let line = third.says(&["fold begins", "metrics"]).await;
    let sequence =
        serde_json::from_str::<serde_json::Value>(&line).unwrap()["sequence"].as_i64().unwrap();
    assert!(snapshots.contains(&("metrics".to_owned(), sequence)), "{line}, kept {snapshots:?}");
    third.ends_in_order().await;
}

#[tokio::test]
async fn a_stop_waits_for_the_requests_in_flight() {
    let mut site = Site::registered(Kind::Postgres).await;
    let _coderd = site.with_coderd().await;
    let stop = CancellationToken::new();
    let tallyman = Tallyman::start(Config::default(), Clock::system(), stop.clone()).await.unwrap();
    site.set("publish.mode", "'sole'");
    site.set("publish.url", &format!("'{}'", tallyman.ingest_url()));
    let mut first = site.start("--role collect --role consume");
    eventually(SOON, "usage waits", || async {
        site.count("select count(*) from publication where state = 'pending'").await > 0
    })
    .await;
    eventually(SOON, "the audits allow publishing", || async {
        site.count("select count(*) from audit_finding where good_until > clock_timestamp()").await
            == 3
    })
    .await;
    first.ends_in_order().await;
    let slow = GRACE + Duration::from_secs(3);
    let latency_ms = slow.as_millis().try_into().unwrap();
    tallyman.set_switches(Switches { latency_ms, ..Switches::default() }).unwrap();
    let mut publishing = site.start("--role publish");
    eventually(SOON, "requests are in flight", || async { tallyman.books().in_flight > 0 }).await;

    let status = publishing.process.terminate(slow + LEEWAY).await;
    assert_eq!(status.code(), Some(0), "{}", publishing.process.stderr());
    assert_eq!(
        site.count("select count(*) from publication_request where answered_at is null").await,
        0
    );
    assert_eq!(
        site.count("select count(*) from publication where leased_until > clock_timestamp()").await,
        0
    );
    let published = site.count("select count(*) from publication where state = 'published'").await;
    assert!(published > 0);
    let requests = site.count("select count(*) from publication_request").await;
    assert_eq!(i64::try_from(tallyman.books().requests), Ok(requests));
    stop.cancel();
    tallyman.stopped().await.unwrap();
}

/// A process whose ledger froze during unfinished work.
async fn frozen(site: &mut Site) -> (Proxy, Running) {
    let (mut proxy, url) = Proxy::to_database(&site.ledger.url);
    proxy.open().await;
    site.set("ledger.url", &format!("'{url}'"));
    let running = site.start("");
    running.ready().await;
    append_builds(&site.log(), 0..500).await;
    site.builds(1).await;
    proxy.freeze();
    append_builds(&site.log(), 500..1000).await;
    (proxy, running)
}

#[tokio::test]
async fn a_frozen_ledger_delays_a_stop_at_most_by_the_grace_period() {
    for kind in [Kind::Postgres, Kind::Kafka] {
        let mut site = Site::registered(kind).await;
        let direct = format!("'{}'", site.ledger.url);
        let (_proxy, mut running) = frozen(&mut site).await;
        let took = running.ends_in_order().await;
        assert!(took < GRACE + LEEWAY, "{kind:?}: {took:?}");
        // another process redoes the unfinished work
        site.set("ledger.url", &direct);
        let mut next = site.start("");
        site.builds(1000).await;
        next.ends_in_order().await;
        assert_eq!(site.balanced().await["accepted"], 1000);
    }
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut site = Site::registered(Kind::Postgres).await;
    let (_proxy, mut running) = frozen(&mut site).await;
    running.process.signal("TERM");
    running.says(&["stopping; a second signal ends at once"]).await;
    assert!(running.process.runs());
    let begun = Instant::now();
    running.process.signal("INT");
    let status = running.process.ends_within(SOON).await;
    assert_eq!(status.code(), Some(130));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_process_that_waits_for_a_server_ends_at_once() {
    let mut site = Site::registered(Kind::Kafka).await;
    let (_turn, proxy) = proxy::kafka().await;
    let direct = site.ledger.url.clone();
    let (ledger, url) = Proxy::to_database(&direct);
    for (url, waits_for) in [(url, ledger.address.to_string()), (direct, proxy.address.to_string())]
    {
        site.set("ledger.url", &format!("'{url}'"));
        site.set("kafka.brokers", &format!("'{}'", proxy.address));
        let mut running = site.start("");
        running.says(&[&waits_for, "waiting"]).await;
        let took = running.ends_in_order().await;
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}

#[tokio::test]
async fn a_frozen_kafka_delays_a_stop_at_most_by_the_grace_period() {
    let mut site = Site::registered(Kind::Kafka).await;
    let (_turn, mut proxy) = proxy::kafka().await;
    proxy.open().await;
    site.set("kafka.brokers", &format!("'{}'", proxy.address));
    let mut running = site.start("");
    running.ready().await;
    append_builds(&site.log(), 0..100).await;
    site.builds(100).await;
    proxy.freeze();
    append_builds(&site.log(), 100..200).await;
    running.ends_in_order().await;
    proxy.thaw();
    let mut next = site.start("");
    site.builds(200).await;
    eventually(SOON, "the process is ready", || async { next.get("/readyz").await.0.is_success() })
        .await;
    next.ends_in_order().await;
    assert_eq!(site.balanced().await["accepted"], 200);
    eventually(SOON, "all connections end", || async { proxy.connections() == 0 }).await;
}
