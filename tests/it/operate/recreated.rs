//! A log that was recreated unnoticed: the partition stops and reports it, the others go on, and
//! every number stays right.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use tallyline::event::{Topic, TopicPartition};

use super::{Kind, Running, SOON, Site, append_builds, messages};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, build, usage};

const BUILDS: &str = "tallyline.workspace-builds.v1";

async fn delete_topic(site: &Site, topic: Topic) {
    let kafka = site.kafka.as_ref().unwrap();
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    let deleted =
        admin.delete_topics(&[&kafka.name(topic.name())], &AdminOptions::new()).await.unwrap();
    assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
}

/// Recreates the topic, once the broker allows it.
async fn recreate(site: &Site) {
    eventually(SOON, "the topic is made again", || async {
        site.log().create_topics(3).await.is_ok()
            && site.log().partitions(Topic::WorkspaceBuilds).await.is_ok()
    })
    .await;
}

/// Fills the topic with `count` records, other than before.
async fn fill(site: &Site, count: u32) {
    site.register(OTHER_DEPLOYMENT).await;
    let others = messages((0..count).map(|n| build(OTHER_DEPLOYMENT, 100_000 + n)));
    site.log().append(Topic::WorkspaceBuilds, others).await.unwrap();
}

async fn append_usage(site: &Site, numbers: std::ops::Range<u32>) {
    site.log()
        .append(Topic::AgentUsage, messages(numbers.map(|n| usage(DEPLOYMENT, n))))
        .await
        .unwrap();
}

/// Checks that all three partitions of the builds are stopped, and that usage goes on.
async fn stopped_while_the_others_go_on(
    site: &Site,
    running: &Running,
    words: &str,
    usage_before: u32,
) {
    let stopped: Vec<String> = (0..3).map(|partition| format!("{BUILDS}/{partition}: ")).collect();
    let why = running
        .not_ready("partitions", &stopped.iter().map(String::as_str).collect::<Vec<_>>())
        .await;
    assert!(why.contains(words) && !why.contains("agent-usage"), "{why}");
    running.says(&["partition stopped", BUILDS, words]).await;
    append_usage(site, usage_before..usage_before + 60).await;
    eventually(SOON, "usage goes on", || async {
        site.count("select count(*) from usage_event").await == i64::from(usage_before) + 60
    })
    .await;
    // no record of the new log was recorded over the old
    let others = "select count(*) from workspace_build join source on source.id = source_id where deployment_id = '00000000-0000-0000-0000-0000000000d2'";
    assert_eq!(site.count(others).await, 0);
    assert_eq!(site.count("select count(*) from workspace_build").await, 300);
    assert_eq!(site.count("select sum(records)::bigint from position where topic = 'tallyline.workspace-builds.v1'").await, 300);
}

/// A site that has recorded 300 builds and 60 usage events.
async fn recorded(kind: Kind) -> (Site, Running) {
    let site = Site::registered(kind).await;
    let running = site.start("");
    running.ready().await;
    append_builds(&site.log(), 0..300).await;
    append_usage(&site, 0..60).await;
    site.builds(300).await;
    eventually(SOON, "usage is there", || async {
        site.count("select count(*) from usage_event").await == 60
    })
    .await;
    (site, running)
}

#[tokio::test]
async fn a_kafka_topic_recreated_with_fewer_records_stops() {
    let (site, mut running) = recorded(Kind::Kafka).await;
    delete_topic(&site, Topic::WorkspaceBuilds).await;
    recreate(&site).await;
    fill(&site, 30).await;
    stopped_while_the_others_go_on(&site, &running, "recreated", 60).await;
    running.ends_in_order().await;
}

/// Readers are kept, and one may still have a partition of the deleted topic. If it is assigned
/// again, librdkafka ends the process.
#[tokio::test]
async fn a_reader_of_a_kafka_topic_that_was_recreated_reads_the_new_one() {
    let site = Site::registered(Kind::Kafka).await;
    let log = site.log();
    append_builds(&log, 0..300).await;
    append_usage(&site, 0..60).await;
    let at = |topic, partition| TopicPartition { topic, partition };
    let partitions = [0, 1, 2].map(|number| at(Topic::WorkspaceBuilds, number));
    // as many readers as are kept, each before its partition's end
    for partition in partitions.into_iter().chain([at(Topic::AgentUsage, 0)]) {
        assert_eq!(log.read(partition, 0, 1).await.unwrap().len(), 1);
    }
    delete_topic(&site, Topic::WorkspaceBuilds).await;
    recreate(&site).await;
    fill(&site, 300).await;
    for partition in partitions {
        assert_eq!(log.read(partition, 5, 1).await.unwrap()[0].offset, 5);
    }
}

#[tokio::test]
async fn a_kafka_topic_recreated_between_runs_stops_and_every_command_reports_it() {
    let (site, mut running) = recorded(Kind::Kafka).await;
    running.ends_in_order().await;
    delete_topic(&site, Topic::WorkspaceBuilds).await;
    recreate(&site).await;
    fill(&site, 900).await;
    let audited = site.command("audit --output json --patience 1").await;
    assert!(
        audited.status.code() == Some(1) && audited.stdout.contains("another_record"),
        "{audited:?}"
    );
    let mut running = site.start("");
    stopped_while_the_others_go_on(&site, &running, "is not the one that was recorded", 60).await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_postgres_log_that_was_truncated_stops() {
    let (site, mut running) = recorded(Kind::Postgres).await;
    let tables = "delete from log_record using log_partition where id = partition_id and topic = 'tallyline.workspace-builds.v1'";
    sqlx::query(tables).execute(&site.ledger.pool).await.unwrap();
    let offsets = "update log_partition set start_offset = 0, next_offset = 0 where topic = 'tallyline.workspace-builds.v1'";
    sqlx::query(offsets).execute(&site.ledger.pool).await.unwrap();
    fill(&site, 30).await;
    stopped_while_the_others_go_on(&site, &running, "log", 60).await;
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_postgres_log_whose_tables_were_emptied_and_recreated_stops() {
    let (site, mut running) = recorded(Kind::Postgres).await;
    let partitions = "truncate log_record, log_partition, log_topic";
    sqlx::query(partitions).execute(&site.ledger.pool).await.unwrap();
    site.migrate().await;
    fill(&site, 900).await;
    // the usage topic is new, too, and its position is beyond the new end
    let stopped: Vec<String> = (0..3)
        .flat_map(|partition| {
            [BUILDS, Topic::AgentUsage.name()].map(|topic| format!("{topic}/{partition}: "))
        })
        .collect();
    running.not_ready("partitions", &stopped.iter().map(String::as_str).collect::<Vec<_>>()).await;
    assert_eq!(site.count("select count(*) from workspace_build").await, 300);
    running.ends_in_order().await;
}

#[tokio::test]
async fn records_that_are_missing_from_a_postgres_log_stop_the_partition() {
    let (site, mut running) = recorded(Kind::Postgres).await;
    running.ends_in_order().await;
    append_builds(&site.log(), 300..600).await;
    // in each partition, the first unread record
    let missing = "delete from log_record using log_partition, position
         where log_partition.id = partition_id and log_partition.topic = position.topic and log_partition.partition = position.partition
             and record_offset = position.next_offset and position.topic = 'tallyline.workspace-builds.v1'";
    sqlx::query(missing).execute(&site.ledger.pool).await.unwrap();
    let mut running = site.start("");
    stopped_while_the_others_go_on(&site, &running, "missing", 60).await;
    running.ends_in_order().await;
}
