//! A ledger, coderd's database and a vendor for one test.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use prometheus::Registry;
use sqlx::PgPool;
use tallyline::clock::Clock;
use tallyline::coderd::Database;
use tallyline::event::{Event, Payload, PublishMarks, Topic, TopicPartition, Usage, UsageQuantity};
use tallyline::ledger::{Arrival, Chain, HeldFor, Ledger, LedgerSettings, Source, sources};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::Operations;
use tallyline::publisher::{Cycle, Publisher, PublisherTelemetry, Settings};
use tallyline::tallyman::ClientSettings;
use tallyline_sim::coderd::{SchemaVersion, Signer};
use tallyline_sim::tallyman::{Config, Switches, Tallyman};
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::support;
use crate::support::coderd::{identify, tables};
use crate::support::ledger::{audited, lease_partition, migrated, record_batch};
use crate::support::process::{Process, tallyline};

pub const DEPLOYMENT: Uuid = Uuid::from_u128(0xd);
pub const ORGANIZATION: Uuid = Uuid::from_u128(0xd0);
const SECRET: [u8; 32] = [7; 32];

pub struct World {
    pub ledger: Ledger,
    /// coderd's access to its database.
    pub coderd: PgPool,
    pub clock: Clock,
    pub vendor: Tallyman,
    pub settings: Settings,
    /// The ledger's source.
    pub source: Source,
    pub stop: CancellationToken,
    ledger_url: String,
    coderd_url: String,
    _databases: [crate::support::Database; 2],
    public_key_pem: String,
    folder: TempDir,
    _stop_at_the_end: DropGuard,
}

pub fn start_time() -> DateTime<Utc> {
    "2025-08-01T12:00:00Z".parse().expect("a time")
}

/// A license token of the vendor, valid at the tests' time.
pub fn license(issued_at: DateTime<Utc>, publish: bool) -> String {
    license_until(start_time() + TimeDelta::days(300), issued_at, publish)
}

/// The same, valid until this instant.
pub fn license_until(expires_at: DateTime<Utc>, issued_at: DateTime<Utc>, publish: bool) -> String {
    signed(&claims(expires_at, issued_at, publish))
}

/// A license that allows publishing, for these deployments.
pub fn license_for(issued_at: DateTime<Utc>, deployment_ids: &serde_json::Value) -> String {
    license_with(issued_at, &[("deployment_ids", deployment_ids.clone())])
}

/// A license that allows publishing, with these claims changed.
pub fn license_with(issued_at: DateTime<Utc>, changes: &[(&str, serde_json::Value)]) -> String {
    let mut claims = claims(start_time() + TimeDelta::days(300), issued_at, true);
    changes.iter().for_each(|(name, value)| claims[*name] = value.clone());
    signed(&claims)
}

fn claims(expires_at: DateTime<Utc>, issued_at: DateTime<Utc>, publish: bool) -> serde_json::Value {
    serde_json::json!({
        "iat": issued_at.timestamp(), "nbf": issued_at.timestamp(), "exp": expires_at.timestamp(),
        "license_expires": (expires_at - TimeDelta::days(10)).timestamp(), "version": 3, "account_type": "salesforce",
        "account_id": "account-1", "features": {}, "publish_usage_data": publish,
    })
}

fn signed(claims: &serde_json::Value) -> String {
    Signer::new(SECRET, "k1").and_then(|signer| signer.sign(claims)).expect("signed")
}

/// The license of every new world; the vendor accepts it.
pub fn first_license() -> String {
    license(start_time() - TimeDelta::days(50), true)
}

/// No mark is ahead of the ledger.
pub async fn no_mark() -> anyhow::Result<()> {
    Ok(())
}

/// One managed agent.
pub fn usage(id: &str, created_at: DateTime<Utc>) -> Usage {
    Usage {
        id: id.to_owned(),
        quantity: UsageQuantity::ManagedAgents(1),
        created_at,
        marks: PublishMarks::default(),
    }
}

impl World {
    /// Mode `sole`, a license that allows publishing, balanced books, no events.
    pub async fn new() -> Self {
        let (clock, stop) = (Clock::manual(start_time()), CancellationToken::new());
        let (ledger_database, coderd_database) =
            (migrated().await, tables(SchemaVersion::Sep2026).await);
        let ledger_settings = LedgerSettings { url: ledger_database.url.clone(), connections: 8 };
        let ledger = Ledger::open(&ledger_settings, clock.clone()).expect("a ledger");
        let coderd = coderd_database.pool.clone();
        identify(&coderd, DEPLOYMENT, ORGANIZATION).await;
        let config = Config {
            license_keys: vec![first_license()],
            deployment_ids: vec![DEPLOYMENT],
            ..Config::default()
        };
        let vendor = Tallyman::start(config, clock.clone(), stop.clone()).await.expect("a vendor");
        let signer = Signer::new(SECRET, "k1").expect("a key pair");
        let mut keys = PublicKeys::new();
        keys.add("k1", &signer.public().public_key_pem).expect("a public key");
        let database =
            Database::new(&coderd_database.url, Duration::from_secs(10)).expect("an address");
        let mut settings = Settings::new(
            DEPLOYMENT,
            Some(database),
            keys,
            ClientSettings::new(vendor.ingest_url()),
        );
        settings.sole = true;
        let source = ledger
            .run(async |conn| {
                sources::register(conn, DEPLOYMENT, start_time(), None, ledger.clock.now()).await
            })
            .await
            .expect("introduced");
        let world = World {
            ledger,
            coderd,
            clock,
            vendor,
            settings,
            source,
            _stop_at_the_end: stop.clone().drop_guard(),
            stop,
            ledger_url: ledger_database.url.clone(),
            coderd_url: coderd_database.url.clone(),
            _databases: [ledger_database, coderd_database],
            public_key_pem: signer.public().public_key_pem.clone(),
            folder: TempDir::new().expect("a folder"),
        };
        world.add_license(&first_license()).await;
        audited(&world.ledger, &[DEPLOYMENT]).await;
        world
    }

    pub async fn with(switches: Switches) -> Self {
        let world = Self::new().await;
        world.vendor.set_switches(switches).expect("possible switches");
        world
    }

    pub fn publisher(&self) -> Publisher {
        self.publisher_in(&Registry::new())
    }

    pub fn publisher_in(&self, registry: &Registry) -> Publisher {
        let telemetry = PublisherTelemetry::register(registry).expect("registered");
        Publisher::new(self.ledger.clone(), self.settings.clone(), telemetry).expect("a publisher")
    }

    /// One cycle of a new publisher.
    pub async fn cycle(&self) -> Cycle {
        self.publisher().cycle(&self.stop).await.expect("a cycle")
    }

    pub fn pass(&self, time: TimeDelta) {
        self.clock.set(self.clock.now() + time);
    }

    pub async fn add_license(&self, jwt: &str) {
        sqlx::query("insert into licenses (uploaded_at, jwt, exp, uuid) values (now(), $1, now(), gen_random_uuid())")
            .bind(jwt)
            .execute(&self.coderd)
            .await
            .expect("a license");
    }

    /// Adds usage to coderd, and accepts it in the ledger.
    pub async fn add(&self, usages: &[Usage]) {
        for usage in usages {
            sqlx::query("insert into usage_events (id, event_type, event_data, created_at) values ($1, $2, $3, $4)")
                .bind(&usage.id)
                .bind(usage.quantity.usage_type().as_str())
                .bind(usage.quantity.to_data())
                .bind(usage.created_at)
                .execute(&self.coderd)
                .await
                .expect("a usage row");
        }
        let partition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
        let claim = lease_partition(&self.ledger, partition, 0).await.expect("claimed");
        let arrival = |(offset, usage): (i64, &Usage)| {
            let event = Event { deployment: DEPLOYMENT, payload: Payload::Usage(usage.clone()) };
            Arrival {
                offset,
                timestamp: self.clock.now(),
                message: event.to_message(),
                event: Ok(event),
                confirmed: false,
            }
        };
        let arrivals: Vec<Arrival> = (claim.next_offset..).zip(usages).map(arrival).collect();
        let next_offset = claim.next_offset + i64::try_from(usages.len()).expect("few");
        let counts = record_batch(&self.ledger, &Chain::Live(claim), &arrivals, next_offset)
            .await
            .expect("recorded");
        assert_eq!(usize::try_from(counts.accepted), Ok(usages.len()));
    }

    /// The same ledger over new connections.
    pub fn ledger_again(&self) -> Ledger {
        Ledger::open(
            &LedgerSettings { url: self.ledger_url.clone(), connections: 2 },
            self.clock.clone(),
        )
        .expect("a ledger")
    }

    /// A log of one partition in the ledger's database.
    pub async fn log(&self) -> Log {
        let log = Log::postgres(self.ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.expect("topics");
        log
    }

    /// Adds usage to coderd and to the log, and accepts it in the ledger.
    pub async fn add_with(&self, log: &Log, usages: &[Usage]) {
        let message = |usage: &Usage| {
            Event { deployment: DEPLOYMENT, payload: Payload::Usage(usage.clone()) }.to_message()
        };
        log.append(Topic::AgentUsage, usages.iter().map(message).collect())
            .await
            .expect("appended");
        self.add(usages).await;
    }

    /// Adds a record of an accepted event to the log, and reads it as a duplicate.
    pub async fn add_again(&self, log: &Log, usage: &Usage) {
        let event = Event { deployment: DEPLOYMENT, payload: Payload::Usage(usage.clone()) };
        log.append(Topic::AgentUsage, vec![event.to_message()]).await.expect("appended");
        let partition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
        let lease = lease_partition(&self.ledger, partition, 0).await.expect("leased");
        let (offset, message) = (lease.next_offset, event.to_message());
        let timestamp = self.clock.now();
        let arrival = Arrival { offset, timestamp, message, event: Ok(event), confirmed: false };
        let counts = record_batch(&self.ledger, &Chain::Live(lease), &[arrival], offset + 1).await;
        assert_eq!(counts.expect("recorded").duplicates, 1);
    }

    /// The operations of this world.
    pub fn operations(&self, log: &Log) -> Operations {
        let (coderd, keys) = (self.settings.coderd.clone(), self.settings.license_keys.clone());
        Operations {
            coderd,
            deployment: Some(DEPLOYMENT),
            keys,
            ..support::ledger::operations(&self.ledger, log)
        }
    }

    /// A process that publishes to this address, with the world's time.
    pub fn process(&self, publish_url: &str) -> Process {
        let file = self.folder.path().join(format!("{}.toml", Uuid::new_v4()));
        std::fs::write(&file, self.pipeline(publish_url)).expect("the pipeline file");
        let offset = (start_time() - Clock::system().now()).num_seconds().to_string();
        let file = file.to_str().expect("a path");
        tallyline(&["run", "--pipeline", file, "--role", "publish", "--clock-offset", &offset], &[])
    }

    /// It does not audit: the log of most tests lacks the ledger's records.
    fn pipeline(&self, publish_url: &str) -> String {
        format!(
            "ledger.url = '{}'
log.partitions = 1
source.coderd_url = '{}'
source.deployment_id = '{DEPLOYMENT}'
license.public_keys.k1 = '''{}'''
publish.mode = 'sole'
publish.url = '{publish_url}'
publish.interval_seconds = 0.2
publish.request_timeout_seconds = 3
audit.interval_seconds = 86400
",
            self.ledger_url, self.coderd_url, self.public_key_pem
        )
    }

    /// Adds `number` events, a second apart, the last one now.
    pub async fn add_many(&self, number: usize) -> Vec<String> {
        let now = self.clock.now();
        let age =
            |index: usize| TimeDelta::seconds(i64::try_from(number - 1 - index).expect("few"));
        let usages: Vec<Usage> = (0..number)
            .map(|index| usage(&format!("event-{index:04}"), now - age(index)))
            .collect();
        self.add(&usages).await;
        usages.into_iter().map(|usage| usage.id).collect()
    }

    /// Sets coderd's marks of one of its rows.
    pub async fn coderd_marks(
        &self,
        id: &str,
        published_at: Option<DateTime<Utc>>,
        publish_started_at: Option<DateTime<Utc>>,
    ) {
        sqlx::query(
            "update usage_events set published_at = $2, publish_started_at = $3 where id = $1",
        )
        .bind(id)
        .bind(published_at)
        .bind(publish_started_at)
        .execute(&self.coderd)
        .await
        .expect("marked");
    }

    pub async fn state(&self, id: &str) -> (String, Option<String>) {
        sqlx::query_as("select state, last_message from publication where event_id = $1")
            .bind(id)
            .fetch_one(&self.ledger.pool)
            .await
            .expect("a publication")
    }

    /// Why an event is held back.
    pub async fn held_for(&self, id: &str) -> Option<HeldFor> {
        let query =
            sqlx::query_scalar("select held_for from publication where event_id = $1").bind(id);
        query.fetch_one(&self.ledger.pool).await.expect("a publication")
    }

    pub async fn states(&self, ids: &[&str]) -> Vec<String> {
        let mut states = Vec::new();
        for id in ids {
            states.push(self.state(id).await.0);
        }
        states
    }

    /// The number of events in that state.
    pub async fn number_in(&self, state: &str) -> i64 {
        let query = sqlx::query_scalar(
            "select count(*) from publication where source_id = $1 and state = $2",
        );
        query.bind(self.source.id).bind(state).fetch_one(&self.ledger.pool).await.expect("counted")
    }

    /// Ends all leases.
    pub async fn end_leases(&self) {
        sqlx::query("update publication set leased_until = clock_timestamp() - interval '1 second' where leased_until is not null")
            .execute(&self.ledger.pool)
            .await
            .expect("ended");
    }

    /// How often the vendor billed the event.
    pub fn times_billed(&self, id: &str) -> usize {
        self.vendor.books().times_billed(DEPLOYMENT, id)
    }

    /// The ids in order of delivery.
    pub fn delivered(&self) -> Vec<String> {
        self.vendor.books().deliveries.into_iter().map(|delivery| delivery.id).collect()
    }
}
