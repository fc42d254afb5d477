//! The collector on a real coderd schema, a real ledger and the log in PostgreSQL.

mod access;
mod complete;
mod cost;
mod once;
mod rows;
mod source;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::collectors::{CollectError, Collector, PassReport, Settings};
use tallyline::event::{Event, Payload, PrebuildClaimed, Topic, TopicPartition, WorkspaceBuildCompleted, parse};
use tallyline::ledger::{Chain, Ledger};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings, Record};
use tallyline::{coderd, consumer};
use uuid::Uuid;

use crate::support::Database;
use crate::support::coderd::Coderd;
use crate::support::ledger::ledger_at;

/// Our side: a ledger and a log in one database.
struct Ours {
    ledger: Ledger,
    log: Log,
    _database: Database,
}

async fn ours() -> Ours {
    let (database, ledger) = ledger_at(Clock::system()).await;
    let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
    log.create_topics(3).await.unwrap();
    Ours { ledger, log, _database: database }
}

/// Every clock of a test is the machine's own, so no margin is needed; a test's collectors take over from each other.
fn settings() -> Settings {
    Settings { margin: TimeDelta::zero(), ..Settings::new("test") }
}

fn source_of(url: &str) -> coderd::Database {
    coderd::Database::new(url, Duration::from_secs(30)).unwrap()
}

impl Ours {
    async fn open(&self, settings: Settings, url: &str) -> Result<Option<Collector>, CollectError> {
        let keys = PublicKeys::new();
        Collector::open(settings, source_of(url), keys, self.log.clone(), self.ledger.clone(), Clock::system()).await
    }

    async fn collector(&self, settings: Settings, coderd: &Coderd) -> Collector {
        self.open(settings, &coderd.database.url).await.unwrap().expect("the source is free")
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
        self.records(topic).await.into_iter().map(|(_, record)| parse(&record.message).unwrap()).collect()
    }

    /// Builds in the log, by id; fails when one is there twice.
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

    /// Usage ids in the log, also of events that do not parse.
    async fn usage_ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = self.records(Topic::AgentUsage).await.iter().map(|(_, record)| header(record, "ce_id")).collect();
        ids.sort();
        ids
    }

    /// Brings the ledger to the log's end, as a consumer does.
    async fn consume(&self) {
        for topic in Topic::ALL {
            for partition in self.log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                let claim = self.ledger.claim(partition, 0).await.unwrap();
                let records = self.log.read(partition, claim.next_offset, 1_000_000).await.unwrap();
                let Some(last) = records.last() else { continue };
                let next_offset = last.offset + 1;
                let arrivals: Vec<_> = records.into_iter().map(consumer::read).collect();
                self.ledger.record(&Chain::Live(claim), &arrivals, next_offset).await.unwrap();
            }
        }
    }
}

fn header(record: &Record, name: &str) -> String {
    let value = record.message.headers.iter().find(|(header, _)| header == name).and_then(|(_, value)| value.clone());
    String::from_utf8(value.unwrap()).unwrap()
}

/// Builds, claims and usage of a pass.
fn produced(report: &PassReport) -> (i32, i32, i32) {
    (report.builds, report.claims, report.usage)
}
