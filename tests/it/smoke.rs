//! The test environment: each server answers, and the harness does what other tests rely on.

use std::process::Command;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Message};

use crate::support::process::Process;
use crate::support::prometheus::{Generation, Prometheus};
use crate::support::{self, eventually};

#[tokio::test]
async fn every_test_has_a_database_of_its_own() {
    let (one, other) = (support::database().await, support::database().await);
    sqlx::query("create table only_here (id int)").execute(&one.pool).await.unwrap();
    let rows: Vec<(String,)> = sqlx::query_as(
        "select current_database() || '.' || relname from pg_class where relname = 'only_here'",
    )
    .fetch_all(&one.pool)
    .await
    .unwrap();
    assert_eq!(rows, [(format!("{}.only_here", one.name),)]);
    let elsewhere: Option<(String,)> = sqlx::query_as(
        "select to_regclass('only_here')::text where to_regclass('only_here') is not null",
    )
    .fetch_optional(&other.pool)
    .await
    .unwrap();
    assert_eq!(elsewhere, None);
}

#[tokio::test]
async fn kafka_takes_a_record_and_gives_it_back() {
    let kafka = support::kafka();
    let topic = kafka.name("smoke");
    let base = || ClientConfig::new().set("bootstrap.servers", &kafka.brokers).clone();

    let admin: AdminClient<DefaultClientContext> = base().create().unwrap();
    let created = admin
        .create_topics(
            &[NewTopic::new(&topic, 6, TopicReplication::Fixed(1))],
            &AdminOptions::new(),
        )
        .await
        .unwrap();
    assert_eq!(created, [Ok(topic.clone())]);

    let producer: FutureProducer =
        base().set("enable.idempotence", "true").set("compression.type", "zstd").create().unwrap();
    let record = FutureRecord::to(&topic).key("key").payload("value");
    let delivered = producer.send(record, Duration::from_secs(30)).await.unwrap();

    for protocol in ["classic", "consumer"] {
        let consumer: StreamConsumer = base()
            .set("group.id", kafka.name(protocol))
            .set("group.protocol", protocol)
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        consumer.subscribe(&[&topic]).unwrap();
        let received = tokio::time::timeout(Duration::from_secs(30), consumer.recv())
            .await
            .expect("a record in time")
            .unwrap();
        assert_eq!((received.key(), received.payload()), (Some(&b"key"[..]), Some(&b"value"[..])));
        assert_eq!(
            (received.partition(), received.offset()),
            (delivered.partition, delivered.offset)
        );
    }
}

#[tokio::test]
async fn both_prometheus_generations_scrape_and_answer() {
    // Each takes five seconds until the first look at its targets.
    tokio::join!(scrapes_itself(Generation::Three, "3."), scrapes_itself(Generation::Two, "2."));
}

async fn scrapes_itself(generation: Generation, version: &str) {
    // It scrapes itself. Its address is known only once it runs, so a file that is written later
    // contains it.
    let folder = tempfile::TempDir::new().unwrap();
    let targets = folder.path().join("targets.json");
    let configuration = format!(
        "scrape_configs: [{{job_name: itself, scrape_interval: 200ms, scrape_timeout: 200ms, file_sd_configs: [{{files: ['{}'], refresh_interval: 200ms}}]}}]",
        targets.display()
    );
    let server = Prometheus::start(generation, &configuration).await;
    let address = server.url.trim_start_matches("http://").to_owned();
    std::fs::write(&targets, format!(r#"[{{"targets": ["{address}"]}}]"#)).unwrap();
    eventually(Duration::from_secs(60), "Prometheus scrapes itself", || async {
        let samples = server.query("up").await;
        samples.len() == 1
            && samples[0].0["instance"] == address
            && (samples[0].1 - 1.0).abs() < f64::EPSILON
    })
    .await;
    let built = server.get("/api/v1/status/buildinfo", &[]).await;
    assert!(built["version"].as_str().unwrap().starts_with(version), "{built}");
}

#[tokio::test]
async fn promtool_finds_a_wrong_configuration() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("prometheus.yml");
    for (text, right) in
        [("global: {scrape_interval: 5s}", true), ("global: {no_such_key: 5s}", false)]
    {
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(support::setting("TALLYLINE_TEST_PROMTOOL"));
        command.args(["check", "config"]).arg(&file);
        let status = Process::spawn(command).ends_within(Duration::from_secs(30)).await;
        assert_eq!(status.success(), right, "{text}");
    }
}

#[tokio::test]
async fn a_process_is_paused_resumed_terminated_and_killed() {
    use std::os::unix::process::ExitStatusExt;

    let begin = || {
        let mut command = Command::new("sleep");
        command.arg("600");
        Process::spawn(command)
    };
    let state = |pid: u32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().rsplit_once(") ").unwrap().1
            [..1]
            .to_owned()
    };

    let mut process = begin();
    process.pause();
    eventually(Duration::from_secs(10), "the process is stopped", || async {
        state(process.pid()) == "T"
    })
    .await;
    assert!(process.runs());
    process.resume();
    eventually(Duration::from_secs(10), "the process runs again", || async {
        state(process.pid()) == "S"
    })
    .await;
    assert_eq!(process.terminate(Duration::from_secs(10)).await.signal(), Some(15));
    assert!(!process.runs());

    let mut killed = begin();
    killed.kill();
    assert!(!killed.runs());

    let dropped = begin();
    let folder = format!("/proc/{}", dropped.pid());
    drop(dropped);
    assert!(!std::path::Path::new(&folder).exists());
}

#[tokio::test]
#[should_panic(expected = "the moon is full")]
async fn a_wait_ends_with_its_reason() {
    eventually(Duration::from_millis(100), "the moon is full", || async { false }).await;
}

#[tokio::test]
async fn the_binary_starts_and_ends() {
    let ended = support::process::run_tallyline(&["--help"], &[]).await;
    assert!(ended.status.success(), "{ended:?}");
}
