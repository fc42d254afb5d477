//! A separate log for one test.

use std::sync::Arc;
use std::time::Duration;

use tallyline::log::{KafkaSettings, Log, PostgresLogSettings, Record};

use super::{BUILDS, builds};
use crate::support::{self, Database, Kafka};

/// The log and its group protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Kafka,
    KafkaEager,
    KafkaNewProtocol,
    Postgres,
}

/// A log with the topics and groups of one test.
#[derive(Clone)]
pub struct Site {
    pub kind: Kind,
    pub log: Log,
    pub kafka: Option<Arc<Kafka>>,
    pub database: Option<Arc<Database>>,
}

/// Partitions of each topic.
pub const PARTITIONS: i32 = 4;

impl Site {
    /// With empty topics of [`PARTITIONS`] partitions.
    pub async fn new(kind: Kind) -> Site {
        let site = Site::bare(kind).await;
        assert_eq!(site.log.create_topics(PARTITIONS).await.unwrap(), Vec::<String>::new());
        site
    }

    /// Without topics.
    pub async fn bare(kind: Kind) -> Site {
        if kind == Kind::Postgres {
            let database = support::ledger::migrated().await;
            let log = Log::postgres(database.pool.clone(), postgres_settings());
            return Site { kind, log, kafka: None, database: Some(Arc::new(database)) };
        }
        let kafka = support::kafka();
        let log = Log::kafka(kafka_settings(kind, &kafka.brokers, &kafka.prefix)).unwrap();
        Site { kind, log, kafka: Some(Arc::new(kafka)), database: None }
    }

    /// The address of the same log for another process, for [`Site::log_of`].
    pub fn address(&self) -> String {
        match (&self.kafka, &self.database) {
            (Some(kafka), _) => format!("{:?} {} {}", self.kind, kafka.brokers, kafka.prefix),
            (_, Some(database)) => format!("{:?} {}", self.kind, database.url),
            _ => unreachable!("a site has one of the two"),
        }
    }

    /// The log at an address.
    pub fn log_of(address: &str) -> Log {
        let words: Vec<&str> = address.split(' ').collect();
        match words[..] {
            ["Postgres", url] => {
                Log::postgres(sqlx::PgPool::connect_lazy(url).unwrap(), postgres_settings())
            }
            [kind, brokers, prefix] => {
                let kind = [Kind::Kafka, Kind::KafkaEager, Kind::KafkaNewProtocol]
                    .into_iter()
                    .find(|one| format!("{one:?}") == kind);
                Log::kafka(kafka_settings(kind.unwrap(), brokers, prefix)).unwrap()
            }
            _ => panic!("no address of a log: {address}"),
        }
    }

    /// All records of a partition of the builds topic, read in pages.
    pub async fn read_all(&self, partition: i32) -> Vec<Record> {
        let (mut next, end) = self.log.watermarks(builds(partition)).await.unwrap();
        let mut all = Vec::new();
        loop {
            let records = self.log.read(builds(partition), next, 7).await.unwrap();
            let Some(last) = records.last() else { break };
            next = last.offset + 1;
            all.extend(records);
        }
        assert_eq!(next, end, "nothing was appended meanwhile");
        all
    }

    /// All records of the builds topic, by partition.
    pub async fn read_topic(&self) -> Vec<Vec<Record>> {
        let mut all = Vec::new();
        for partition in self.log.partitions(BUILDS).await.unwrap() {
            all.push(self.read_all(partition).await);
        }
        all
    }
}

/// The broker notices members that do not poll as soon as its default limits allow.
fn kafka_settings(kind: Kind, brokers: &str, prefix: &str) -> KafkaSettings {
    let mut settings = KafkaSettings::new(brokers);
    prefix.clone_into(&mut settings.topic_prefix);
    settings.batch_linger = Duration::from_millis(20);
    let more = match kind {
        Kind::KafkaNewProtocol => Some(("group.protocol", "consumer")),
        Kind::KafkaEager => Some(("partition.assignment.strategy", "range")),
        Kind::Kafka | Kind::Postgres => None,
    };
    for (name, value) in more.into_iter().chain([("max.poll.interval.ms", "6000")]) {
        settings.properties.insert(name.to_owned(), value.to_owned());
    }
    settings
}

fn postgres_settings() -> PostgresLogSettings {
    PostgresLogSettings {
        lease: Duration::from_secs(2),
        poll: Duration::from_millis(20),
        ..PostgresLogSettings::default()
    }
}
