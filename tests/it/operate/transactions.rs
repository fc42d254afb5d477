//! Transactions of another producer in the topics: control records, aborted records, and an open
//! transaction.

use std::time::Duration;

use chrono::{DateTime, Utc};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use serde_json::Value;
use tallyline::event::{Message, Topic};

use super::{Kind, SOON, Site, append_builds};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, build};

const BUILDS: i64 = 50;

/// A foreign transactional producer.
fn transactional(site: &Site) -> BaseProducer {
    let kafka = site.kafka.as_ref().unwrap();
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.brokers)
        .set("transactional.id", kafka.name("foreign"))
        .set("transaction.timeout.ms", "600000")
        .create()
        .unwrap();
    producer.init_transactions(SOON).unwrap();
    producer
}

fn send(site: &Site, producer: &BaseProducer, partition: i32, message: &Message) {
    let topic = site.kafka.as_ref().unwrap().name(Topic::WorkspaceBuilds.name());
    let headers = message.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
        headers.insert(Header { key, value: value.as_ref() })
    });
    let key = message.key.clone().unwrap_or_default();
    let payload = message.payload.clone().unwrap_or_default();
    let record =
        BaseRecord::to(&topic).partition(partition).key(&key).payload(&payload).headers(headers);
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.flush(SOON).unwrap();
}

fn partition(status: &Value, number: i64) -> Value {
    let partitions = status["partitions"].as_array().unwrap();
    let builds = partitions
        .iter()
        .find(|one| one["topic"] == Topic::WorkspaceBuilds.name() && one["partition"] == number);
    builds.unwrap_or_else(|| panic!("no partition {number} in {status}")).clone()
}

async fn all_is_read(site: &Site) {
    eventually(SOON, "every position is at the log's end, and nothing lags", || async {
        let status = site.status().await;
        (0..3)
            .map(|number| partition(&status, number))
            .all(|one| one["lag"] == 0 && one["position"] == one["log_end"])
    })
    .await;
}

#[tokio::test]
async fn control_records_and_aborted_records_are_skipped_also_on_an_idle_partition() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    let mut running = site.start("");
    append_builds(&log, 0..50).await;
    site.builds(BUILDS).await;

    let producer = transactional(&site);
    producer.begin_transaction().unwrap();
    send(&site, &producer, 0, &build(DEPLOYMENT, 100).to_message());
    producer.commit_transaction(SOON).unwrap();
    producer.begin_transaction().unwrap();
    // partition 2 gets nothing else, and stays idle
    for number in 1..3 {
        send(
            &site,
            &producer,
            number,
            &build(DEPLOYMENT, 100 + u32::try_from(number).unwrap()).to_message(),
        );
    }
    producer.abort_transaction(SOON).unwrap();

    site.builds(BUILDS + 1).await;
    all_is_read(&site).await;
    assert_eq!(
        site.count("select count(*) from workspace_build").await,
        BUILDS + 1,
        "aborted records are not counted"
    );
    let numbers = site.balanced().await;
    assert_eq!(
        (&numbers["records"], &numbers["records_waiting_in_the_log"]),
        (&(BUILDS + 1).into(), &0.into())
    );
    let deep = site.command("audit --deep --output json --patience 1").await;
    assert_eq!(deep.status.code(), Some(0), "{deep:?}");

    // another process starts after the control records and reads later records
    running.process.kill();
    let mut running = site.start("");
    append_builds(&log, 200..250).await;
    site.builds(BUILDS + 1 + 50).await;
    all_is_read(&site).await;
    assert!(!running.process.stderr().contains("consumer stalled"), "{}", running.process.stderr());
    running.ends_in_order().await;
}

#[tokio::test]
async fn an_open_transaction_of_another_producer_is_shown_as_waiting_and_nothing_behind_it_as_complete()
 {
    let mut site = Site::new(Kind::Kafka).await;
    let _coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'serve']");
    let mut running = site.start("");
    let complete_until = async || -> Option<DateTime<Utc>> {
        let status = site.status().await;
        status["sources"][0]["complete_until"].as_str().and_then(|until| until.parse().ok())
    };
    eventually(SOON, "the source is complete to some instant", || async {
        complete_until().await.is_some()
    })
    .await;
    all_is_read(&site).await;

    let producer = transactional(&site);
    producer.begin_transaction().unwrap();
    send(&site, &producer, 0, &build(DEPLOYMENT, 100).to_message());
    let last = "select pass_id from collector_progress";
    let (opened, before) = (site.count(last).await, complete_until().await);
    // the second pass from here on began during the open transaction
    eventually(SOON, "passes go on", || async { site.count(last).await >= opened + 5 }).await;
    let claimed: DateTime<Utc> =
        sqlx::query_scalar("select max(complete_until) from collector_pass")
            .fetch_one(&site.ledger.pool)
            .await
            .unwrap();
    let status = site.status().await;
    let waiting = partition(&status, 0);
    assert!(
        waiting["lag"].as_i64().unwrap() > 0 && waiting["in_open_transaction"] == waiting["lag"],
        "{waiting}"
    );
    let until = complete_until().await;
    assert!(until >= before && until < Some(claimed), "{until:?} is not before {claimed}");
    let table = site.command("status").await.stdout;
    assert!(table.contains("tallyline.workspace-builds.v1/0: 1 offsets wait until another producer's open transaction ends"), "{table}");

    producer.commit_transaction(SOON).unwrap();
    eventually(SOON, "the source is complete again", || async {
        complete_until().await >= Some(claimed)
    })
    .await;
    all_is_read(&site).await;
    assert!(running.ends_in_order().await < Duration::from_secs(30));
}
