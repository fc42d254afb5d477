//! Records that are too large for Tallyline, and brokers that refuse Tallyline's.

use std::os::unix::fs::FileExt as _;

use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use sha2::{Digest as _, Sha256};
use tallyline::event::{Topic, TopicPartition};

use super::{Kind, Running, SOON, Site, append_builds, eventually_some};
use crate::support::{eventually, setting};

/// Unpacked; it is about 10 KB packed.
const LARGE: usize = 100 * 1024 * 1024;

/// A foreign producer with this number of records in each batch.
fn foreign(site: &Site, records: usize) -> BaseProducer {
    ClientConfig::new()
        .set("bootstrap.servers", &site.kafka.as_ref().unwrap().brokers)
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .set("batch.size", "1000000000")
        .set("batch.num.messages", records.to_string())
        .set("linger.ms", "60000")
        .set("queue.buffering.max.kbytes", "1000000")
        .create()
        .unwrap()
}

/// Appends one zstd batch of this number of records with this payload.
fn packed(site: &Site, payload: &[u8], records: usize) {
    let topic = site.kafka.as_ref().unwrap().name(Topic::WorkspaceBuilds.name());
    let producer = foreign(site, records);
    for _ in 0..records {
        producer
            .send(BaseRecord::<[u8], [u8]>::to(&topic).partition(0).payload(payload))
            .map_err(|(error, _)| error)
            .unwrap();
    }
    producer.flush(SOON).unwrap();
    assert_eq!(producer.in_flight_count(), 0);
}

/// The peak of a process's memory, in KiB.
fn peak_memory(running: &Running) -> usize {
    let memory =
        std::fs::read_to_string(format!("/proc/{}/status", running.process.pid())).unwrap();
    memory
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap()
}

#[tokio::test]
async fn a_record_that_unpacks_to_100_mb_is_kept_by_its_hash_and_beginning_and_stops_nothing() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    let mut running = site.start("--role consume");
    append_builds(&log, 0..50).await;
    site.builds(50).await;
    let payload = vec![b'x'; LARGE];
    packed(&site, &payload, 1);
    append_builds(&log, 50..150).await;
    site.builds(150).await;

    let row = eventually_some(SOON, "the record is a reject", async || {
        let query = "select id, detail, octet_length(payload), whole_bytes, whole_sha256 from reject where cause = 'oversized'";
        sqlx::query_as::<_, (i64, String, i32, i64, Vec<u8>)>(query).fetch_optional(&site.ledger.pool).await.unwrap()
    })
    .await;
    let sha256 = Sha256::digest(&payload).to_vec();
    assert_eq!((row.2, row.3, &row.4), (64 * 1024, i64::try_from(LARGE).unwrap(), &sha256));
    assert!(
        row.1.contains(&LARGE.to_string()) && row.1.contains(&hex::encode(&sha256)),
        "{}",
        row.1
    );
    let peak = peak_memory(&running);
    assert!(peak < 900 * 1024, "{peak} KiB at most");

    // the deep audit and the operations accept a record that is kept in part
    site.balanced().await;
    let deep = site.command("audit --deep --output json --patience 1").await;
    assert_eq!(deep.status.code(), Some(0), "{deep:?}");
    let reject = site.command(&format!("rejects show {} --output json", row.0)).await;
    let reject: serde_json::Value = serde_json::from_str(&reject.stdout).unwrap();
    assert_eq!(
        (&reject["payload"]["length"], &reject["payload"]["cut"]),
        (&LARGE.into(), &true.into())
    );
    let resubmitted =
        site.command(&format!("rejects resubmit {} --force --reason a-test", row.0)).await;
    assert_eq!(resubmitted.status.code(), Some(4), "{resubmitted:?}");
    assert!(resubmitted.stderr.contains("kept only in part"), "{resubmitted:?}");
    let discarded = site.command(&format!("rejects discard {} --reason a-test", row.0)).await;
    assert!(discarded.status.success(), "{discarded:?}");
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_batch_that_unpacks_beyond_the_limit_is_one_reject_and_stops_nothing() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    let at = TopicPartition { topic: Topic::WorkspaceBuilds, partition: 0 };
    append_builds(&log, 0..50).await;
    let (_, first) = log.watermarks(at).await.unwrap();
    // two in a row, together 1 GB
    let zeros = vec![0; 250 * 1024 * 1024];
    packed(&site, &zeros, 2);
    packed(&site, &zeros, 2);
    append_builds(&log, 50..150).await;
    let mut running = site.start("");
    site.builds(150).await;

    let rejects: Vec<(i64, i64, String)> = eventually_some(SOON, "each batch is a reject", async || {
        let query = "select id, log_offset, detail from reject where cause = 'oversized' order by log_offset";
        let rejects: Vec<_> = sqlx::query_as(query).fetch_all(&site.ledger.pool).await.unwrap();
        (rejects.len() == 2).then_some(rejects)
    })
    .await;
    for ((_, offset, detail), first) in rejects.iter().zip([first, first + 2]) {
        assert_eq!(*offset, first + 1);
        assert!(detail.contains(&format!("offsets {first} to {}", first + 1)), "{detail}");
        assert!(detail.contains("receive.message.max.bytes"), "{detail}");
    }
    assert_eq!(site.count("select count(*) from reject").await, 2);
    running
        .says(&[
            "batch cannot be unpacked",
            &at.to_string(),
            &format!("offsets {first} to {}", first + 1),
        ])
        .await;
    let peak = peak_memory(&running);
    assert!(peak < 1200 * 1024, "{peak} KiB at most");

    site.balanced().await;
    let deep = site.command("audit --deep --output json --patience 1").await;
    assert_eq!(deep.status.code(), Some(0), "{deep:?}");
    let planned = site.command("replay plan --all-topics --from earliest --output json").await;
    let plan: serde_json::Value = serde_json::from_str(&planned.stdout)
        .unwrap_or_else(|error| panic!("{error}: {planned:?}"));
    assert_eq!(
        plan["partitions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["rejects"].as_i64().unwrap())
            .sum::<i64>(),
        2,
        "{plan}"
    );
    let resubmitted =
        site.command(&format!("rejects resubmit {} --force --reason a-test", rejects[0].0)).await;
    assert_eq!(resubmitted.status.code(), Some(4), "{resubmitted:?}");
    assert!(resubmitted.stderr.contains("discard it"), "{resubmitted:?}");

    // another process goes on after a batch that was the last one
    packed(&site, &zeros, 2);
    eventually(SOON, "the third is a reject", || async {
        site.count("select count(*) from reject").await == 3
    })
    .await;
    running.ends_in_order().await;
    let mut running = site.start("");
    append_builds(&log, 150..200).await;
    site.builds(200).await;
    site.balanced().await;
    running.ends_in_order().await;
}

/// Changes a byte of the packed records of the batch at this offset of partition 0, in the broker's
/// file.
fn damage(site: &Site, offset: i64) {
    let properties = std::fs::read_to_string(setting("TALLYLINE_TEST_KAFKA_PROPERTIES")).unwrap();
    let folder = properties.lines().find_map(|line| line.strip_prefix("log.dirs=")).unwrap();
    let topic = site.kafka.as_ref().unwrap().name(Topic::WorkspaceBuilds.name());
    let path = format!("{folder}/{topic}-0/{:020}.log", 0);
    let bytes = std::fs::read(&path).unwrap();
    // a batch: its first offset, the length of the rest, and after 61 bytes its records
    let mut at = 0;
    while i64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) != offset {
        at += 12
            + usize::try_from(i32::from_be_bytes(bytes[at + 8..at + 12].try_into().unwrap()))
                .unwrap();
    }
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[!bytes[at + 61]], u64::try_from(at + 61).unwrap()).unwrap();
}

#[tokio::test]
async fn a_damaged_batch_stops_its_partition_until_it_is_removed_and_recovered() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    let at = TopicPartition { topic: Topic::WorkspaceBuilds, partition: 0 };
    append_builds(&log, 0..50).await;
    let mut running = site.start("");
    site.builds(50).await;
    running.ends_in_order().await;
    let (_, first) = log.watermarks(at).await.unwrap();
    packed(&site, &[0; 10_000], 1);
    damage(&site, first);
    append_builds(&log, 50..150).await;

    let mut running = site.start("");
    running
        .not_ready(
            "partitions",
            &[
                &at.to_string(),
                &format!("offset {first} cannot be read"),
                "recover plan --lost log",
            ],
        )
        .await;
    running.says(&["partition stopped", &at.to_string(), "cannot be read"]).await;
    assert!(running.metrics().await.contains("tallyline_consumer_partitions_not_read 1\n"));
    eventually_some(SOON, "status shows it, and the other partitions are read", async || {
        let status = site.status().await;
        let processes = status["processes"].as_array()?.iter();
        let mut reasons = processes
            .filter_map(|one| one["standing"]["consume"]["not_read"][at.to_string()].as_str());
        let why = reasons.next()?.to_owned();
        let others = status["partitions"]
            .as_array()?
            .iter()
            .filter(|one| one["topic"] == at.topic.name() && one["partition"] != 0);
        (why.contains("cannot be read")
            && others.clone().count() == 2
            && others.clone().all(|one| one["lag"] == 0))
        .then_some(())
    })
    .await;
    assert_eq!(site.count("select count(*) from reject").await, 0);

    let kafka = site.kafka.as_ref().unwrap();
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    let mut before = TopicPartitionList::new();
    before
        .add_partition_offset(&kafka.name(at.topic.name()), 0, Offset::Offset(first + 1))
        .unwrap();
    admin.delete_records(&before, &AdminOptions::new()).await.unwrap();
    let planned = site.command("recover plan --lost log --output json").await;
    let plan: serde_json::Value = serde_json::from_str(&planned.stdout)
        .unwrap_or_else(|error| panic!("{error}: {planned:?}"));
    let executed = site
        .command(&format!(
            "recover execute --plan {} --reason a-test",
            plan["hash"].as_str().unwrap()
        ))
        .await;
    assert!(executed.status.success(), "{executed:?}");
    site.builds(150).await;
    running.ready().await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn brokers_that_refuse_our_records_by_size_are_shown_with_the_setting_to_change() {
    let mut site = Site::new(Kind::Kafka).await;
    let _coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'serve']");
    let kafka = site.kafka.as_ref().unwrap();
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    let topic = kafka.name(Topic::WorkspaceBuilds.name());
    let limit = async |bytes: &str| {
        let small =
            AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("max.message.bytes", bytes);
        let altered = admin.alter_configs(&[small], &AdminOptions::new()).await.unwrap();
        assert!(altered.iter().all(Result::is_ok), "{altered:?}");
    };
    limit("200").await;
    let mut running = site.start("");
    let state = eventually_some(SOON, "status shows it", async || {
        let status = site.status().await;
        let state = status["processes"][0]["standing"]["collect"]["standing"].as_str()?.to_owned();
        state.contains("max.message.bytes").then_some(state)
    })
    .await;
    assert!(state.contains(&topic), "{state}");
    let metrics = running.metrics().await;
    let counter =
        "tallyline_collector_refused_by_size_total{topic=\"tallyline.workspace-builds.v1\"} ";
    let count = metrics.lines().find_map(|line| line.strip_prefix(counter)?.parse::<f64>().ok());
    assert!(count.is_some_and(|count| count >= 1.0), "{metrics}");

    limit("1048588").await;
    eventually_some(SOON, "all is collected once the limit is raised", async || {
        let status = site.status().await;
        (status["sources"][0]["backfilled"] == true).then_some(())
    })
    .await;
    running.ends_in_order().await;
}
