//! Foreign programs that touch Tallyline's resources: a producer with transactions, and a second
//! pipeline with a wrong deployment id.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use serde_json::Value as Json;
use tokio::task::block_in_place;
use uuid::Uuid;

use crate::inject::MET;
use crate::support::eventually;
use crate::world::{GRACE, World};

/// The time limit for an answer of the broker.
const ANSWERED: Duration = Duration::from_secs(30);

/// A producer that writes to the log's topics in transactions, one at a time.
pub struct ForeignProducer {
    producer: BaseProducer,
    partitions: Vec<(String, i32)>,
}

impl ForeignProducer {
    fn start(brokers: &str, topics: &[String]) -> ForeignProducer {
        let id = format!("foreign-{}", Uuid::new_v4().simple());
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("transactional.id", id)
            .create()
            .expect("a producer");
        let partitions = block_in_place(|| {
            producer.init_transactions(ANSWERED).expect("the broker knows transactions");
            topics.iter().flat_map(|topic| partitions(&producer, topic)).collect()
        });
        ForeignProducer { producer, partitions }
    }

    /// Begins a transaction with a record in each of these partitions. When it returns, the broker
    /// has them. Returns their number.
    fn write(&self, into: impl Fn(&str, i32) -> bool) -> usize {
        block_in_place(|| {
            self.producer.begin_transaction().expect("begin");
            let partitions =
                self.partitions.iter().filter(|(topic, partition)| into(topic, *partition));
            let records = partitions.map(|(topic, partition)| {
                let record = BaseRecord::<(), [u8]>::to(topic)
                    .partition(*partition)
                    .payload(b"not an event");
                self.producer.send(record).map_err(|(error, _)| error).expect("send");
            });
            let count = records.count();
            self.producer.flush(ANSWERED).expect("flush");
            count
        })
    }

    fn commit(&self) {
        block_in_place(|| self.producer.commit_transaction(ANSWERED)).expect("commit");
    }

    fn abort(&self) {
        block_in_place(|| self.producer.abort_transaction(ANSWERED)).expect("abort");
    }
}

fn partitions(producer: &BaseProducer, topic: &str) -> Vec<(String, i32)> {
    let metadata = producer.client().fetch_metadata(Some(topic), ANSWERED).expect("metadata");
    let [of_topic] = metadata.topics() else {
        panic!("{topic}: {} topics", metadata.topics().len())
    };
    assert!(!of_topic.partitions().is_empty(), "{topic} has no partitions");
    of_topic.partitions().iter().map(|partition| (topic.to_owned(), partition.id())).collect()
}

impl World {
    /// Writes committed records, aborted records in every partition, and a transaction that stays
    /// open over all partitions of one topic.
    pub async fn foreign_transactions_begin(&mut self, roll: u64) {
        let producer = ForeignProducer::start(&self.brokers, &self.topics);
        let number = i32::try_from(roll % 6).expect("small");
        self.foreign_records += producer.write(|_, partition| partition == number);
        producer.commit();
        let aborted = producer.write(|_, _| true);
        producer.abort();
        let open = ForeignProducer::start(&self.brokers, &self.topics);
        let held = self.topics[usize::try_from(roll % 3).expect("small")].clone();
        self.open_records = open.write(|topic, _| topic == held);
        self.say(&format!(
            "{aborted} foreign records are aborted, and {} are open in {held}",
            self.open_records
        ));
        self.open_transaction = Some(open);
        let is_held = |row: &Json| row["topic"].as_str().is_some_and(|topic| held.ends_with(topic));
        let waiting = |row: &Json| is_held(row) && row["in_open_transaction"].as_i64() > Some(0);
        let partitions = self.partitions().await;
        assert!(
            partitions.iter().any(waiting),
            "the open transaction in {held} is shown as waiting: {partitions:?}"
        );
    }

    pub async fn foreign_transaction_ends(&mut self, roll: u64) {
        let open = self.open_transaction.take().expect("a transaction");
        if roll.is_multiple_of(2) {
            open.commit();
            self.foreign_records += self.open_records;
        } else {
            open.abort();
        }
    }

    /// After the last record of every partition come only aborted records and their abort marker.
    pub async fn partitions_end_in_aborted_records(&mut self) {
        let producer = ForeignProducer::start(&self.brokers, &self.topics);
        producer.write(|_, _| true);
        producer.abort();
    }

    /// Collector and publisher report the configured and the true deployment id, and do nothing.
    pub async fn a_wrong_deployment_id_is_refused(&mut self) {
        let (right, wrong) = (self.deployment.to_string(), Uuid::new_v4().to_string());
        let setting = format!("source.deployment_id={wrong}");
        for role in ["collect", "publish"] {
            let mut process = self.site.start(role, &["--set", &setting]);
            eventually(MET, &format!("{role} with a wrong deployment id is refused"), || {
                let output = process.stderr();
                let refused = output.contains(&right) && output.contains(&wrong);
                async move { refused }
            })
            .await;
            if process.runs() {
                process.signal("TERM");
            }
            process.ends_within(GRACE).await;
        }
        let sources: Vec<Uuid> = sqlx::query_scalar("select deployment_id from source")
            .fetch_all(&self.site.database.pool)
            .await
            .expect("sources");
        assert!(
            sources.iter().all(|source| *source == self.deployment),
            "only the true deployment id is introduced: {sources:?}"
        );
    }
}
