//! Records that are too large for us, and brokers for which ours are too large.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use sha2::{Digest as _, Sha256};
use tallyline::event::Topic;

use super::{Kind, SOON, Site, append_builds, found};

/// Unpacked; packed it is some 10 KB.
const LARGE: usize = 100 * 1024 * 1024;

fn packed(site: &Site, payload: &[u8]) {
    let kafka = site.kafka.as_ref().unwrap();
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.brokers)
        .set("compression.type", "zstd")
        .set("message.max.bytes", "200000000")
        .set("queue.buffering.max.kbytes", "1000000")
        .create()
        .unwrap();
    let topic = kafka.name(Topic::WorkspaceBuilds.name());
    producer.send(BaseRecord::<[u8], [u8]>::to(&topic).partition(0).payload(payload)).map_err(|(error, _)| error).unwrap();
    producer.flush(SOON).unwrap();
    assert_eq!(producer.in_flight_count(), 0);
}

#[tokio::test]
async fn a_record_that_unpacks_to_100_mb_is_kept_by_its_hash_and_beginning_and_stops_nothing() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    let mut running = site.start("--role consume");
    append_builds(&log, 0..50).await;
    site.builds(50).await;
    let payload = vec![b'x'; LARGE];
    packed(&site, &payload);
    append_builds(&log, 50..150).await;
    site.builds(150).await;

    let row = found(SOON, "the record is a reject", async || {
        let query = "select id, detail, octet_length(payload), whole_bytes, whole_sha256 from reject where cause = 'oversized'";
        sqlx::query_as::<_, (i64, String, i32, i64, Vec<u8>)>(query).fetch_optional(&site.ledger.pool).await.unwrap()
    })
    .await;
    let sha256 = Sha256::digest(&payload).to_vec();
    assert_eq!((row.2, row.3, &row.4), (64 * 1024, i64::try_from(LARGE).unwrap(), &sha256));
    assert!(row.1.contains(&LARGE.to_string()) && row.1.contains(&hex::encode(&sha256)), "{}", row.1);
    let memory = std::fs::read_to_string(format!("/proc/{}/status", running.process.pid())).unwrap();
    let peak = memory.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok()).unwrap();
    assert!(peak < 900 * 1024, "{peak} KiB at most");

    // the deep audit and the desk cope with a record that is kept in part
    site.balanced().await;
    let deep = site.command("audit --deep --output json --patience 1").await;
    assert_eq!(deep.status.code(), Some(0), "{deep:?}");
    let shown = site.command(&format!("rejects show {} --output json", row.0)).await;
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!((&shown["payload"]["length"], &shown["payload"]["cut"]), (&LARGE.into(), &true.into()));
    let resubmitted = site.command(&format!("rejects resubmit {} --force --reason a-test", row.0)).await;
    assert_eq!(resubmitted.status.code(), Some(4), "{resubmitted:?}");
    assert!(resubmitted.stderr.contains("kept only in part"), "{resubmitted:?}");
    let discarded = site.command(&format!("rejects discard {} --reason a-test", row.0)).await;
    assert!(discarded.status.success(), "{discarded:?}");
    running.ends_in_order().await;
}

#[tokio::test]
async fn brokers_that_refuse_our_records_by_size_are_shown_with_the_setting_to_change() {
    let mut site = Site::new(Kind::Kafka).await;
    let _coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'serve']");
    let kafka = site.kafka.as_ref().unwrap();
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    let topic = kafka.name(Topic::WorkspaceBuilds.name());
    let limit = async |bytes: &str| {
        let small = AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("max.message.bytes", bytes);
        let altered = admin.alter_configs(&[small], &AdminOptions::new()).await.unwrap();
        assert!(altered.iter().all(Result::is_ok), "{altered:?}");
    };
    limit("200").await;
    let mut running = site.start("");
    let standing = found(SOON, "status shows it", async || {
        let status = site.status().await;
        let standing = status["processes"][0]["standing"]["collect"]["standing"].as_str()?.to_owned();
        standing.contains("max.message.bytes").then_some(standing)
    })
    .await;
    assert!(standing.contains(&topic), "{standing}");
    let metrics = running.metrics().await;
    let counter = "tallyline_collector_refused_by_size_total{topic=\"tallyline.workspace-builds.v1\"} ";
    let count = metrics.lines().find_map(|line| line.strip_prefix(counter)?.parse::<f64>().ok());
    assert!(count.is_some_and(|count| count >= 1.0), "{metrics}");

    limit("1048588").await;
    found(SOON, "all is collected once the limit is raised", async || {
        let status = site.status().await;
        (status["sources"][0]["backfilled"] == true).then_some(())
    })
    .await;
    running.ends_in_order().await;
}
