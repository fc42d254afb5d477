//! The settings, typed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use uuid::Uuid;

use super::given::Values;
use super::{Key, Secret, TokenSetting};

/// All settings of one deployment shape. Names and defaults are those of [`super::KEYS`].
#[derive(Clone, Debug, Deserialize)]
pub struct Pipeline {
    /// What `tallyline run` does.
    pub roles: BTreeSet<Role>,
    pub ledger: PostgresLedger,
    pub log: LogBackend,
    /// Kafka, where the log is there.
    pub kafka: Kafka,
    /// The deployment that is metered.
    #[serde(default)]
    pub source: Source,
    /// The collector.
    pub collect: Collect,
    /// The consumer.
    pub consume: Consume,
    /// Licenses.
    pub license: License,
    /// The publisher.
    pub publish: Publish,
    /// What listens.
    pub serve: Serve,
    /// What listens where the role serve is not there.
    #[serde(default)]
    pub telemetry: Telemetry,
}

/// A role of `tallyline run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// From coderd's database to the log.
    Collect,
    /// From the log into the ledger.
    Consume,
    /// From the ledger to Tallyman.
    Publish,
    /// The API and `/metrics`.
    Serve,
}

/// `[ledger]`
#[derive(Clone, Debug, Deserialize)]
pub struct PostgresLedger {
    /// A PostgreSQL URL.
    pub url: Secret,
    /// Most connections of this process; where they are not given, those that its roles need.
    #[serde(default)]
    pub connections: u32,
}

/// `[log]`
#[derive(Clone, Debug, Deserialize)]
pub struct LogBackend {
    /// Which backend.
    pub kind: LogKind,
    /// Partitions of a topic that is created.
    pub partitions: u32,
    /// The consumers' group.
    pub group: String,
    /// The name of the verification key that signs.
    pub signing_key: Option<String>,
    /// By name.
    #[serde(default)]
    pub verification_keys: BTreeMap<String, Secret>,
}

/// Where the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogKind {
    /// Tables in the ledger's database.
    Postgres,
    /// Kafka.
    Kafka,
}

/// `[kafka]`
#[derive(Clone, Debug, Deserialize)]
pub struct Kafka {
    /// `host:port`, separated by commas; there when the log's kind is Kafka.
    pub brokers: Option<String>,
    /// Before every topic and group name.
    pub topic_prefix: String,
    /// librdkafka's.
    #[serde(default)]
    pub properties: BTreeMap<String, Secret>,
}

/// `[source]`
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Source {
    /// coderd's database; there when a role needs it.
    pub coderd_url: Option<Secret>,
    /// Where it is not to be read from coderd.
    pub deployment_id: Option<Uuid>,
    /// Histograms begin here.
    pub introduced_at: Option<DateTime<Utc>>,
    /// Collection begins here; none: at the beginning.
    pub backfill_from: Option<DateTime<Utc>>,
}

/// `[collect]`
#[derive(Clone, Debug, Deserialize)]
pub struct Collect {
    /// Between two passes.
    #[serde(rename = "poll_seconds", deserialize_with = "seconds")]
    pub poll: Duration,
    /// Before the database's now.
    #[serde(rename = "margin_seconds", deserialize_with = "seconds")]
    pub margin: Duration,
    /// Between two full sweeps.
    #[serde(rename = "full_sweep_hours", deserialize_with = "seconds")]
    pub full_sweep: Duration,
}

/// `[consume]`
#[derive(Clone, Debug, Deserialize)]
pub struct Consume {
    /// Records may wait for so long while their partition does not move.
    #[serde(rename = "stall_seconds", deserialize_with = "seconds")]
    pub stall: Duration,
}

/// `[license]`
#[derive(Clone, Debug, Deserialize)]
pub struct License {
    /// By name (`kid`): PEM, base64 or hex, checked, also where it was given as a file.
    #[serde(default)]
    pub public_keys: BTreeMap<String, String>,
    /// The rule set's name.
    pub rules: String,
}

/// `[publish]`
#[derive(Clone, Debug, Deserialize)]
pub struct Publish {
    /// Whether anything is sent.
    pub mode: PublishMode,
    /// Tallyman's ingest endpoint.
    pub url: String,
    /// Between two looks at the queue.
    #[serde(rename = "interval_seconds", deserialize_with = "seconds")]
    pub interval: Duration,
    /// For a whole request.
    #[serde(rename = "request_timeout_seconds", deserialize_with = "seconds")]
    pub request_timeout: Duration,
}

/// Who publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    /// coderd does; we compare.
    Shadow,
    /// Only we do.
    Sole,
}

/// `[serve]`
#[derive(Clone, Debug, Deserialize)]
pub struct Serve {
    pub api_listen: SocketAddr,
    /// `/metrics`.
    pub metrics_listen: SocketAddr,
    /// How often the books are audited.
    #[serde(rename = "audit_seconds", deserialize_with = "seconds")]
    pub audit: Duration,
    /// Who may ask, by the name under which they act.
    #[serde(default)]
    pub tokens: BTreeMap<String, TokenSetting>,
    /// Host names, beside loopback's own, that a request may name.
    #[serde(default)]
    pub host_names: Vec<String>,
}

/// `[telemetry]`
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Telemetry {
    /// `/metrics`, `/healthz` and `/readyz` of a process that does not serve.
    pub listen: Option<SocketAddr>,
}

/// Connections to the ledger for what every process does: its heartbeat, the pauses, the search for a restored ledger, and callers of
/// its health.
const OWN_CONNECTIONS: u32 = 4;

impl Pipeline {
    /// From values that have been checked.
    ///
    /// # Panics
    /// When the table of keys and the types here disagree: any load of any file shows that.
    pub(super) fn of(values: &Values) -> Pipeline {
        let mut settings = Value::Null;
        for (full, (value, _)) in &values.found {
            let key = Key::of(full).expect("a key of the table");
            let place = key.name.split('.').fold(&mut settings, |section, name| &mut section[name]);
            match full.get(key.name.len() + 1..) {
                Some(entry) => place[entry] = value.clone(),
                None => *place = value.clone(),
            }
        }
        let mut pipeline: Pipeline = serde_json::from_value(settings).expect("the table of keys and the types agree");
        if pipeline.ledger.connections == 0 {
            pipeline.ledger.connections = OWN_CONNECTIONS + pipeline.roles.iter().map(|role| role.connections()).sum::<u32>();
        }
        pipeline
    }

    /// Each secret that is set, with its key.
    #[must_use]
    pub fn secrets(&self) -> Vec<(String, &Secret)> {
        let mut secrets = vec![("ledger.url".to_owned(), &self.ledger.url)];
        secrets.extend(self.log.verification_keys.iter().map(|(name, secret)| (format!("log.verification_keys.{name}"), secret)));
        secrets.extend(self.kafka.properties.iter().map(|(name, secret)| (format!("kafka.properties.{name}"), secret)));
        secrets.extend(self.source.coderd_url.iter().map(|secret| ("source.coderd_url".to_owned(), secret)));
        secrets.extend(self.serve.tokens.iter().map(|(name, token)| (format!("serve.tokens.{name}"), &token.secret)));
        secrets
    }
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 4] = [Role::Collect, Role::Consume, Role::Publish, Role::Serve];

    /// Connections to the ledger that the role uses at once: a collector's pass; four partitions at a time; a publisher's cycle; two folds
    /// and an audit or an answer. More of them would only wait for each other.
    fn connections(self) -> u32 {
        match self {
            Role::Collect | Role::Publish => 1,
            Role::Consume => 4,
            Role::Serve => 3,
        }
    }

    /// As in the pipeline file.
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
