//! The typed settings.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use uuid::Uuid;

use super::settings::Values;
use super::{Key, Secret, TokenSetting};

/// All settings of one deployment shape. [`super::KEYS`] defines names and defaults.
#[derive(Clone, Debug, Deserialize)]
pub struct Pipeline {
    /// Roles of `tallyline run`.
    pub roles: BTreeSet<Role>,
    pub ledger: PostgresLedger,
    pub log: LogBackend,
    /// Kafka, if it is the log.
    pub kafka: Kafka,
    /// The metered deployment.
    #[serde(default)]
    pub source: Source,
    pub collect: Collect,
    pub consume: Consume,
    pub retention: Retention,
    pub license: License,
    pub publish: Publish,
    /// The continuous audit of each process that collects, publishes or serves.
    pub audit: ContinuousAudit,
    /// The listeners of the role `serve`.
    pub serve: Serve,
    /// The listener of a process without the role `serve`.
    #[serde(default)]
    pub telemetry: Telemetry,
}

/// A role of `tallyline run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads coderd's database into the log.
    Collect,
    /// Reads the log into the ledger.
    Consume,
    /// Publishes usage to Tallyman.
    Publish,
    /// Serves the API and `/metrics`.
    Serve,
}

/// `[ledger]`
#[derive(Clone, Debug, Deserialize)]
pub struct PostgresLedger {
    /// A PostgreSQL URL.
    pub url: Secret,
    /// Maximum connections of this process. Default: the number that its roles need.
    #[serde(default)]
    pub connections: u32,
}

/// `[log]`
#[derive(Clone, Debug, Deserialize)]
pub struct LogBackend {
    pub kind: LogKind,
    /// Partitions of each created topic.
    pub partitions: u32,
    /// The consumer group.
    pub group: String,
    /// Name of the verification key that signs.
    pub signing_key: Option<String>,
    /// Verification keys by name.
    #[serde(default)]
    pub verification_keys: BTreeMap<String, Secret>,
}

/// Backend of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogKind {
    /// Tables in the ledger's database.
    Postgres,
    Kafka,
}

/// `[kafka]`
#[derive(Clone, Debug, Deserialize)]
pub struct Kafka {
    /// A list of `host:port`, separated by commas; set if the log is in Kafka.
    pub brokers: Option<String>,
    /// Prefix of every topic and group name.
    pub topic_prefix: String,
    /// Properties of librdkafka.
    #[serde(default)]
    pub properties: BTreeMap<String, Secret>,
}

/// `[source]`
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Source {
    /// coderd's database; set if a role needs it.
    pub coderd_url: Option<Secret>,
    /// Deployment id, if it is not to be read from coderd.
    pub deployment_id: Option<Uuid>,
    /// Histograms begin at this instant.
    pub introduced_at: Option<DateTime<Utc>>,
    /// Collection begins at this instant; `None` for everything.
    pub backfill_from: Option<DateTime<Utc>>,
}

/// `[collect]`
#[derive(Clone, Debug, Deserialize)]
pub struct Collect {
    /// Interval of the passes.
    #[serde(rename = "poll_seconds", deserialize_with = "seconds")]
    pub poll: Duration,
    /// A pass is complete until this long before the database's current time.
    #[serde(rename = "margin_seconds", deserialize_with = "seconds")]
    pub margin: Duration,
}

/// `[consume]`
#[derive(Clone, Debug, Deserialize)]
pub struct Consume {
    /// Maximum time without progress of a partition while records wait.
    #[serde(rename = "stall_seconds", deserialize_with = "seconds")]
    pub stall: Duration,
}

/// `[retention]`: days, 0 for ever.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Retention {
    /// Headers and bodies of ended rejects.
    pub reject_payload_days: u32,
    /// Attempts of settled publications.
    pub attempt_days: u32,
}

/// `[license]`
#[derive(Clone, Debug, Deserialize)]
pub struct License {
    /// Keys by name (`kid`): checked PEM, base64 or hex. A key given as a file is already read.
    #[serde(default)]
    pub public_keys: BTreeMap<String, String>,
    /// Name of the rule set.
    pub rules: String,
}

/// `[publish]`
#[derive(Clone, Debug, Deserialize)]
pub struct Publish {
    pub mode: PublishMode,
    /// Tallyman's ingest endpoint.
    pub url: String,
    /// Interval of the checks of the queue.
    #[serde(rename = "interval_seconds", deserialize_with = "seconds")]
    pub interval: Duration,
    /// Timeout of a whole request.
    #[serde(rename = "request_timeout_seconds", deserialize_with = "seconds")]
    pub request_timeout: Duration,
    /// The largest number of requests in flight.
    pub concurrency: usize,
}

/// Which side publishes usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    /// coderd publishes; Tallyline only compares.
    Shadow,
    /// Only Tallyline publishes.
    Sole,
}

/// `[audit]`
#[derive(Clone, Debug, Deserialize)]
pub struct ContinuousAudit {
    /// Interval of the audits.
    #[serde(rename = "interval_seconds", deserialize_with = "seconds")]
    pub interval: Duration,
    /// Intervals without an audit after which publishing is held.
    #[serde(rename = "late_after_intervals")]
    pub late_after: u32,
}

/// `[serve]`
#[derive(Clone, Debug, Deserialize)]
pub struct Serve {
    pub api_listen: SocketAddr,
    /// Address of `/metrics`.
    pub metrics_listen: SocketAddr,
    /// Tokens by name. The name is the actor in the audit log.
    #[serde(default)]
    pub tokens: BTreeMap<String, TokenSetting>,
    /// Accepted host names besides loopback's.
    #[serde(default)]
    pub host_names: Vec<String>,
}

/// `[telemetry]`
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Telemetry {
    /// Address of `/metrics`, `/healthz` and `/readyz` of a process without the role `serve`.
    pub listen: Option<SocketAddr>,
}

/// Connections to the ledger for the work of every process: heartbeat, pauses, restore monitor,
/// health checks, and the audit.
const OWN_CONNECTIONS: u32 = 5;

impl Pipeline {
    /// Converts checked values.
    ///
    /// # Panics
    /// If the table of keys and these types disagree. Loading any file shows this.
    pub(super) fn of(values: &Values) -> Pipeline {
        let mut settings = Value::Null;
        for (full, (value, _)) in &values.entries {
            let key = Key::of(full).expect("a key of the table");
            let place = key.name.split('.').fold(&mut settings, |section, name| &mut section[name]);
            match full.get(key.name.len() + 1..) {
                Some(entry) => place[entry] = value.clone(),
                None => *place = value.clone(),
            }
        }
        let mut pipeline: Pipeline =
            serde_json::from_value(settings).expect("the table of keys and the types agree");
        if pipeline.ledger.connections == 0 {
            pipeline.ledger.connections =
                OWN_CONNECTIONS + pipeline.roles.iter().map(|role| role.connections()).sum::<u32>();
        }
        pipeline
    }

    /// All configured secrets, with their keys.
    #[must_use]
    pub fn secrets(&self) -> Vec<(String, &Secret)> {
        let mut secrets = vec![("ledger.url".to_owned(), &self.ledger.url)];
        secrets.extend(
            self.log
                .verification_keys
                .iter()
                .map(|(name, secret)| (format!("log.verification_keys.{name}"), secret)),
        );
        secrets.extend(
            self.kafka
                .properties
                .iter()
                .map(|(name, secret)| (format!("kafka.properties.{name}"), secret)),
        );
        secrets.extend(
            self.source.coderd_url.iter().map(|secret| ("source.coderd_url".to_owned(), secret)),
        );
        secrets.extend(
            self.serve
                .tokens
                .iter()
                .map(|(name, token)| (format!("serve.tokens.{name}"), &token.secret)),
        );
        secrets
    }
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Collect, Role::Consume, Role::Publish, Role::Serve];

    /// Connections to the ledger that the role uses at once: one pass of a collector; four
    /// partitions; two requests of a publisher, which it writes down or records while others are in
    /// flight; two projections and an audit or an answer. More
    /// connections would only wait for each other.
    fn connections(self) -> u32 {
        match self {
            Role::Collect => 1,
            Role::Publish => 2,
            Role::Consume => 4,
            Role::Serve => 3,
        }
    }

    /// The name in the pipeline file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Collect => "collect",
            Role::Consume => "consume",
            Role::Publish => "publish",
            Role::Serve => "serve",
        }
    }
}

fn seconds<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    f64::deserialize(from).map(Duration::from_secs_f64)
}
