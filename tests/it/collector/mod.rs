//! The collector on a real coderd schema, a real ledger and the PostgreSQL log.

mod access;
mod complete;
mod cost;
mod identity;
mod late;
mod once;
mod rows;
mod source;
mod times;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::TimeDelta;
use serde_json::json;
use tallyline::clock::Clock;
use tallyline::collectors::{CollectError, Collector, PassReport, Settings};
use tallyline::event::{
    Event, Payload, PrebuildClaimed, RejectCause, Topic, TopicPartition, WorkspaceBuildCompleted,
    parse,
};
use tallyline::ledger::{
    ActKind, Arrival, Chain, Disposition, Ledger, NewAct, Refusal, Subject, collector_requests,
    rejects,
};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings, Record};
use tallyline::{coderd, consumer};
use uuid::Uuid;

use crate::support::Database;
use crate::support::coderd::Coderd;
use crate::support::ledger::{lease_partition, ledger_at, record_batch};

/// Tallyline's side: a ledger and a log in one database.
struct Store {
    ledger: Ledger,
    log: Log,
    _database: Database,
}

async fn store() -> Store {
    let (database, ledger) = ledger_at(Clock::system()).await;
    let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
    log.create_topics(3).await.unwrap();
    Store { ledger, log, _database: database }
}

/// All clocks of a test are the machine's, so no margin is needed. Its collectors take over from
/// each other.
fn settings() -> Settings {
    Settings { margin: TimeDelta::zero(), ..Settings::new("test") }
}

fn source_of(url: &str) -> coderd::Database {
    coderd::Database::new(url, Duration::from_secs(30)).unwrap()
}

impl Store {
    async fn open(&self, settings: Settings, url: &str) -> Result<Option<Collector>, CollectError> {
        let keys = PublicKeys::new();
        Collector::open(
            settings,
            source_of(url),
            keys,
            self.log.clone(),
            self.ledger.clone(),
            Clock::system(),
        )
        .await
    }

    async fn collector(&self, settings: Settings, coderd: &Coderd) -> Collector {
        self.open(settings, &coderd.database.url).await.unwrap().expect("the source is free")
    }

    /// Requests a full sweep, as an operator does, and runs it.
    async fn sweep(&self, collector: &mut Collector) -> PassReport {
        let source = collector.source().id;
        self.ledger
            .run(async |conn| collector_requests::add_sweep(conn, source).await)
            .await
            .unwrap();
        collector.pass().await.unwrap()
    }

    async fn records(&self, topic: Topic) -> Vec<(TopicPartition, Record)> {
        let mut all = Vec::new();
        for partition in self.log.partitions(topic).await.unwrap() {
            let partition = TopicPartition { topic, partition };
            let records = self.log.read(partition, 0, 1_000_000).await.unwrap();
            all.extend(records.into_iter().map(|record| (partition, record)));
        }
        all
    }

    async fn events(&self, topic: Topic) -> Vec<Event> {
        self.records(topic)
            .await
            .into_iter()
            .map(|(_, record)| parse(&record.message).unwrap())
            .collect()
    }

    /// Builds in the log, by id. Fails if one is there twice.
    async fn builds(&self) -> BTreeMap<Uuid, WorkspaceBuildCompleted> {
        let mut builds = BTreeMap::new();
        for event in self.events(Topic::WorkspaceBuilds).await {
            let Payload::Build(build) = event.payload else { panic!("not a build") };
            assert!(builds.insert(build.build_id, *build).is_none(), "a build is in the log twice");
        }
        builds
    }

    async fn claims(&self) -> Vec<PrebuildClaimed> {
        let claim = |event: Event| match event.payload {
            Payload::Claim(claim) => *claim,
            _ => panic!("not a claim"),
        };
        self.events(Topic::PrebuildClaims).await.into_iter().map(claim).collect()
    }

    /// Usage ids in the log, including those of events that do not parse.
    async fn usage_ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = self
            .records(Topic::AgentUsage)
            .await
            .iter()
            .map(|(_, record)| header(record, "ce_id"))
            .collect();
        ids.sort();
        ids
    }

    /// Reads the log to its end, as a consumer does.
    async fn consume(&self) {
        for topic in Topic::ALL {
            self.consume_topic(topic).await;
        }
    }

    async fn consume_topic(&self, topic: Topic) {
        self.consume_as(topic, |record| consumer::read_from(topic, record)).await;
    }

    async fn consume_as(&self, topic: Topic, read: impl Fn(Record) -> Arrival) {
        for partition in self.log.partitions(topic).await.unwrap() {
            let partition = TopicPartition { topic, partition };
            let claim = lease_partition(&self.ledger, partition, 0).await.unwrap();
            let records = self.log.read(partition, claim.next_offset, 1_000_000).await.unwrap();
            let Some(last) = records.last() else { continue };
            let next_offset = last.offset + 1;
            let arrivals: Vec<_> = records.into_iter().map(&read).collect();
            record_batch(&self.ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
        }
    }

    /// The ends of the log's partitions.
    async fn ends(&self) -> BTreeMap<TopicPartition, i64> {
        let mut ends = BTreeMap::new();
        for topic in Topic::ALL {
            for partition in self.log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                ends.insert(partition, self.log.watermarks(partition).await.unwrap().1);
            }
        }
        ends
    }

    /// Reads the log to these ends, as a slow consumer does.
    async fn consume_to(&self, ends: &BTreeMap<TopicPartition, i64>) {
        for (partition, end) in ends {
            let claim = lease_partition(&self.ledger, *partition, 0).await.unwrap();
            let records = self.log.read(*partition, claim.next_offset, 1_000_000).await.unwrap();
            let arrivals: Vec<_> = records
                .into_iter()
                .filter(|record| record.offset < *end)
                .map(|record| consumer::read_from(partition.topic, record))
                .collect();
            if !arrivals.is_empty() {
                record_batch(&self.ledger, &Chain::Live(claim), &arrivals, *end).await.unwrap();
            }
        }
    }

    /// Refuses the unread prebuild claims, as if PostgreSQL did not accept them, and sets the state
    /// of these rejects.
    async fn refuse_claims(&self, state: &str) {
        let refusal = || Refusal {
            disposition: Disposition::Rejected,
            cause: RejectCause::Ledger,
            detail: "refused".to_owned(),
        };
        self.consume_as(Topic::PrebuildClaims, |record| Arrival {
            event: Err(refusal()),
            ..consumer::read(record)
        })
        .await;
        if state != "open" {
            let act = NewAct {
                actor: "a",
                act: ActKind::Discard,
                subject: Subject::Reject(1),
                reason: "a test",
                detail: json!({}),
            };
            let act_id = self
                .ledger
                .run(async |conn| rejects::begin_acts(conn, &[act], self.ledger.clock.now()).await)
                .await
                .unwrap()[0];
            let ended =
                sqlx::query("update reject set state = $1, act_id = $2 where state = 'open'")
                    .bind(state)
                    .bind(act_id);
            ended.execute(&self.ledger.pool).await.unwrap();
        }
    }
}

fn header(record: &Record, name: &str) -> String {
    let value = record
        .message
        .headers
        .iter()
        .find(|(header, _)| header == name)
        .and_then(|(_, value)| value.clone());
    String::from_utf8(value.unwrap()).unwrap()
}

fn produced(report: &PassReport) -> (i32, i32, i32) {
    (report.builds, report.claims, report.usage)
}

/// Recreates a topic, as an operator can: all its records are gone, and it begins at 0.
async fn recreate_topic(store: &Store, topic: Topic) {
    for statement in [
        "delete from log_record where partition_id in (select id from log_partition where topic = $1)",
        "update log_partition set start_offset = 0, next_offset = 0 where topic = $1",
    ] {
        sqlx::query(statement).bind(topic.name()).execute(&store.ledger.pool).await.unwrap();
    }
}
