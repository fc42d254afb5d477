//! A ledger and a log on Kafka, a collector with keys, and an attacker who may only produce.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Utc};
use prometheus::{Registry, TextEncoder};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use serde_json::{Value, json};
use tallyline::consumer::{Consumer, ConsumerTelemetry};
use tallyline::event::{Event, Message, Signatures, Signer, Topic, TopicPartition};
use tallyline::ledger::{Ledger, cutover, positions, snapshots};
use tallyline::log::{KafkaSettings, Log};
use tallyline::operations::recover::{Lost, RecoverExecution, RecoverRequest};
use tallyline::operations::{Actor, LogRange, Operations, ReplayExecution, Step};
use tallyline::projection::fold_to;
use tallyline::stages::{LicensesState, MetricsState};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{
    DEPLOYMENT, GROUP, act, ask, build, claim, ledger, operations, register, usage,
};
use crate::support::{Database, Kafka, eventually, kafka, setting};

pub const SOON: Duration = Duration::from_secs(120);

pub struct World {
    pub database: Database,
    pub ledger: Ledger,
    kafka: Kafka,
}

/// Keys with these names, and the signing one.
pub fn keys(names: &[&str], signing: &str) -> Signatures {
    let keys = names
        .iter()
        .map(|name| ((*name).to_owned(), format!("{name} {}", "k".repeat(32)).into_bytes()));
    Signatures::new(keys.collect(), Some(signing.to_owned())).expect("keys")
}

/// Events of all kinds with these numbers.
pub fn events(numbers: std::ops::Range<u32>) -> Vec<Event> {
    let kinds: [fn(uuid::Uuid, u32) -> Event; 3] = [build, claim, usage];
    numbers.flat_map(|n| kinds.map(|kind| kind(DEPLOYMENT, n))).collect()
}

impl World {
    /// A registered deployment, and topics with two partitions each.
    pub async fn new() -> World {
        let (database, ledger) = ledger().await;
        register(&ledger, &[DEPLOYMENT]).await;
        let world = World { database, ledger, kafka: kafka() };
        world.log(Signatures::default()).create_topics(2).await.unwrap();
        world
    }

    /// The log of a process with these keys.
    pub fn log(&self, signatures: Signatures) -> Log {
        let topic_prefix = self.kafka.prefix.clone();
        Log::kafka(KafkaSettings {
            topic_prefix,
            signatures,
            ..KafkaSettings::new(&self.kafka.brokers)
        })
        .unwrap()
    }

    pub fn topic_name(&self, topic: Topic) -> String {
        self.kafka.name(topic.name())
    }

    pub fn operations(&self, signatures: Signatures) -> Operations {
        operations(&self.ledger, &self.log(signatures))
    }

    /// A collector appends these events; without keys it does not sign them.
    pub async fn collect(&self, events: &[Event], signatures: Signatures) {
        let log = self.log(signatures);
        for (topic, messages) in
            by_topic(events.iter().map(|event| (event.topic(), event.to_message())))
        {
            log.append_signed(Signer::Collector, topic, messages).await.unwrap();
        }
    }

    /// A foreign producer appends these messages.
    pub async fn produce(&self, messages: impl IntoIterator<Item = (Topic, Message)>) {
        let log = self.log(Signatures::default());
        for (topic, messages) in by_topic(messages) {
            log.append(topic, messages).await.unwrap();
        }
    }

    /// Every record of the log, unchanged.
    pub async fn records(&self) -> Vec<(Topic, Message)> {
        let (log, mut records) = (self.log(Signatures::default()), Vec::new());
        for topic in Topic::ALL {
            for partition in log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                let (start, _) = log.watermarks(partition).await.unwrap();
                let read = log.read(partition, start, 1_000_000).await.unwrap();
                records.extend(read.into_iter().map(|record| (topic, record.message)));
            }
        }
        records
    }

    /// A consumer with these keys reads the log to its ends.
    pub async fn consume(&self, signatures: Signatures) {
        self.consume_with(&self.consumer(signatures)).await;
    }

    pub fn consumer(&self, signatures: Signatures) -> Consumer {
        let telemetry = ConsumerTelemetry::register(&Registry::new()).unwrap();
        Consumer::new(self.log(signatures), self.ledger.clone(), GROUP, telemetry)
    }

    pub async fn consume_with(&self, consumer: &Consumer) {
        let (consumer, log, stop) =
            (consumer.clone(), consumer.log.clone(), CancellationToken::new());
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { consumer.run(&stop).await }
        });
        eventually(SOON, "the log is read to its ends", || async {
            let bound = !log.signatures().verify()
                || self.ledger.run(cutover::signed_since).await.is_ok_and(|since| since.is_some());
            bound && self.has_read(&log).await
        })
        .await;
        stop.cancel();
        task.await.unwrap();
    }

    async fn has_read(&self, log: &Log) -> bool {
        let positions: BTreeMap<TopicPartition, i64> =
            self.ledger.run(positions::list).await.unwrap_or_default().into_iter().collect();
        self.ends_of(log).await.iter().all(|(partition, end)| positions.get(partition) == Some(end))
    }

    /// The end of each partition of the log.
    pub async fn ends(&self) -> Vec<(TopicPartition, i64)> {
        self.ends_of(&self.log(Signatures::default())).await
    }

    async fn ends_of(&self, log: &Log) -> Vec<(TopicPartition, i64)> {
        let mut ends = Vec::new();
        for topic in Topic::ALL {
            for partition in log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                ends.push((partition, log.watermarks(partition).await.unwrap().1));
            }
        }
        ends
    }

    /// All counted, shown and billed values, without their places in the log: rows, series and
    /// license counts.
    pub async fn books(&self) -> Vec<Value> {
        let query = "select to_jsonb(b) - 'batch_id' - 'log_offset' - 'confirmed_at' from workspace_build b
             union all select to_jsonb(c) - 'batch_id' - 'log_offset' - 'confirmed_at' from prebuild_claim c
             union all select to_jsonb(u) - 'batch_id' - 'log_offset' - 'confirmed_at' from usage_event u
             union all select jsonb_build_object('publication', event_id, 'state', state) from publication
             union all select to_jsonb(f) from workspace_first_start f
             order by 1";
        let mut books: Vec<Value> =
            sqlx::query_scalar(query).fetch_all(&self.ledger.pool).await.unwrap();
        books.extend(self.pages().await);
        books
    }

    /// The page of `/metrics` and the managed agents of each deployment.
    async fn pages(&self) -> Vec<Value> {
        let metrics = fold_to::<MetricsState>(&self.ledger, i64::MAX).await.unwrap().state;
        let licenses = fold_to::<LicensesState>(&self.ledger, i64::MAX).await.unwrap().state;
        let pages = metrics.deployments().map(|(deployment, metrics)| {
            let families: Vec<_> = metrics
                .families()
                .into_iter()
                .filter(|family| !family.get_metric().is_empty())
                .collect();
            let page = TextEncoder::new().encode_to_string(&families).unwrap();
            json!({"deployment": deployment, "page": page.lines().collect::<Vec<_>>()})
        });
        let agents = licenses.deployments().map(|(deployment, licenses)| {
            let agents = &licenses.agents;
            let count = agents.count(DateTime::UNIX_EPOCH, DateTime::<Utc>::MAX_UTC);
            json!({"deployment": deployment, "events": agents.events(), "agents": count.to_string()})
        });
        pages.chain(agents).collect()
    }

    pub async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.ledger.pool).await.unwrap()
    }

    /// The causes of all rejects, each once.
    pub async fn causes(&self) -> Vec<String> {
        sqlx::query_scalar("select distinct cause from reject order by 1")
            .fetch_all(&self.ledger.pool)
            .await
            .unwrap()
    }

    /// Replays all topics. Returns the number of added events.
    pub async fn replay(&self, signatures: Signatures) -> u64 {
        let operations = self.operations(signatures);
        let stop = CancellationToken::new();
        let topics = Topic::ALL.map(|topic| topic.name().to_owned()).to_vec();
        let range = LogRange { topics, from: "earliest".into(), until: "latest".into() };
        let plan = ask(&operations, &range).await.unwrap();
        let request = ReplayExecution { hash: plan.hash, records_per_second: Some(1_000_000) };
        let replayed =
            operations.execute_replay(&request, &operator(), &|_: Step| {}, &stop).await.unwrap();
        replayed.accepted.try_into().unwrap()
    }

    /// Kafka loses all topics, and a recovery follows: topics without records.
    pub async fn lose_kafka(&self, signatures: Signatures) {
        let log = self.log(Signatures::default());
        let names = Topic::ALL.map(|topic| self.kafka.name(topic.name()));
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", setting("TALLYLINE_TEST_KAFKA"))
            .create()
            .unwrap();
        admin
            .delete_topics(&names.each_ref().map(String::as_str), &AdminOptions::new())
            .await
            .unwrap();
        for topic in Topic::ALL {
            eventually(SOON, "the topic is gone", || async {
                log.partitions(topic).await.is_err()
            })
            .await;
        }
        self.recover(Lost::Log, signatures).await;
    }

    /// Restores the ledger from this backup, and recovers it.
    pub async fn lose_ledger(&self, backup: &Path, signatures: Signatures) {
        self.restore(backup).await;
        self.recover(Lost::Ledger, signatures).await;
    }

    /// Restores the ledger from this backup, before any process notices.
    pub async fn restore(&self, backup: &Path) {
        self.database.restore(backup).await;
        eventually(SOON, "the ledger answers again", || async {
            self.ledger.run(snapshots::head).await.is_ok()
        })
        .await;
    }

    pub async fn recover(&self, lost: Lost, signatures: Signatures) {
        let operations = Operations { partitions: 2, ..self.operations(signatures) };
        let request = RecoverRequest { lost, without: Vec::new() };
        let plan = ask(&operations, &request).await.unwrap();
        let execution = RecoverExecution { hash: plan.hash.expect("something is lost") };
        act(&operations, &execution, &operator()).await.unwrap();
    }
}

pub fn operator() -> Actor {
    Actor { name: "sre-1".into(), reason: "a test".into() }
}

fn by_topic(messages: impl IntoIterator<Item = (Topic, Message)>) -> BTreeMap<Topic, Vec<Message>> {
    let mut topics: BTreeMap<Topic, Vec<Message>> = BTreeMap::new();
    for (topic, message) in messages {
        topics.entry(topic).or_default().push(message);
    }
    topics
}
