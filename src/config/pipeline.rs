//! The settings, typed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::given::Values;
use super::value::Value;
use super::{Secret, TokenSetting};

/// All settings of one deployment shape. Names and defaults are those of [`super::KEYS`].
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// What `tallyline run` does.
    pub roles: BTreeSet<Role>,
    /// The ledger.
    pub ledger: PostgresLedger,
    /// The log.
    pub log: LogBackend,
    /// Kafka, where the log is there.
    pub kafka: Kafka,
    /// The deployment that is metered.
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
    pub telemetry: Telemetry,
}

/// A role of `tallyline run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
#[derive(Clone, Debug)]
pub struct PostgresLedger {
    /// A PostgreSQL URL.
    pub url: Secret,
    /// Most connections of this process.
    pub connections: u32,
}

/// `[log]`
#[derive(Clone, Debug)]
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
    pub verification_keys: BTreeMap<String, Secret>,
}

/// Where the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogKind {
    /// Tables in the ledger's database.
    Postgres,
    /// Kafka.
    Kafka,
}

/// `[kafka]`
#[derive(Clone, Debug)]
pub struct Kafka {
    /// `host:port`, separated by commas; there when the log's kind is Kafka.
    pub brokers: Option<String>,
    /// Before every topic and group name.
    pub topic_prefix: String,
    /// librdkafka's.
    pub properties: BTreeMap<String, Secret>,
}

/// `[source]`
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug)]
pub struct Collect {
    /// Between two passes.
    pub poll: Duration,
    /// Before the database's now.
    pub margin: Duration,
    /// Between two full sweeps.
    pub full_sweep: Duration,
}

/// `[consume]`
#[derive(Clone, Debug)]
pub struct Consume {
    /// Records may wait for so long while their partition does not move.
    pub stall: Duration,
}

/// `[license]`
#[derive(Clone, Debug)]
pub struct License {
    /// By name (`kid`): PEM, base64 or hex, checked, also where it was given as a file.
    pub public_keys: BTreeMap<String, String>,
    /// The rule set's name.
    pub rules: String,
}

/// `[publish]`
#[derive(Clone, Debug)]
pub struct Publish {
    /// Whether anything is sent.
    pub mode: PublishMode,
    /// Tallyman's ingest endpoint.
    pub url: String,
    /// Between two looks at the queue.
    pub interval: Duration,
    /// For a whole request.
    pub request_timeout: Duration,
}

/// Who publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishMode {
    /// coderd does; we compare.
    Shadow,
    /// Only we do.
    Sole,
}

/// `[serve]`
#[derive(Clone, Debug)]
pub struct Serve {
    /// The API.
    pub api_listen: SocketAddr,
    /// `/metrics`.
    pub metrics_listen: SocketAddr,
    /// How often the books are audited.
    pub audit: Duration,
    /// Who may ask, by the name under which they act.
    pub tokens: BTreeMap<String, TokenSetting>,
    /// Host names, beside loopback's own, that a request may name.
    pub host_names: Vec<String>,
}

/// `[telemetry]`
#[derive(Clone, Debug)]
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
    /// When the table of keys and the reading here disagree: any load of any file shows that.
    pub(super) fn of(values: &Values) -> Pipeline {
        let roles: BTreeSet<Role> = values.words("roles").iter().map(|word| Role::named(word)).collect();
        let connections = match values.get("ledger.connections") {
            Some(_) => values.whole("ledger.connections"),
            None => OWN_CONNECTIONS + roles.iter().map(|role| role.connections()).sum::<u32>(),
        };
        Pipeline {
            roles,
            ledger: PostgresLedger { url: values.secret("ledger.url").expect("checked to be there"), connections },
            log: LogBackend {
                kind: if values.text("log.kind").as_deref() == Some("kafka") { LogKind::Kafka } else { LogKind::Postgres },
                partitions: values.whole("log.partitions"),
                group: values.defaulted("log.group"),
                signing_key: values.text("log.signing_key"),
                verification_keys: values.secrets("log.verification_keys"),
            },
            kafka: Kafka {
                brokers: values.text("kafka.brokers"),
                topic_prefix: values.defaulted("kafka.topic_prefix"),
                properties: values.secrets("kafka.properties"),
            },
            source: Source {
                coderd_url: values.secret("source.coderd_url"),
                deployment_id: values.id("source.deployment_id"),
                introduced_at: values.time("source.introduced_at"),
                backfill_from: values.time("source.backfill_from"),
            },
            collect: Collect {
                poll: values.duration("collect.poll_seconds"),
                margin: values.duration("collect.margin_seconds"),
                full_sweep: values.duration("collect.full_sweep_hours"),
            },
            consume: Consume { stall: values.duration("consume.stall_seconds") },
            license: License { public_keys: values.texts("license.public_keys"), rules: values.defaulted("license.rules") },
            publish: Publish {
                mode: if values.text("publish.mode").as_deref() == Some("sole") { PublishMode::Sole } else { PublishMode::Shadow },
                url: values.defaulted("publish.url"),
                interval: values.duration("publish.interval_seconds"),
                request_timeout: values.duration("publish.request_timeout_seconds"),
            },
            serve: Serve {
                api_listen: values.listen("serve.api_listen"),
                metrics_listen: values.listen("serve.metrics_listen"),
                audit: values.duration("serve.audit_seconds"),
                tokens: values.tokens("serve.tokens"),
                host_names: values.get("serve.host_names").map(|_| values.words("serve.host_names").to_vec()).unwrap_or_default(),
            },
            telemetry: Telemetry { listen: values.get("telemetry.listen").map(|_| values.listen("telemetry.listen")) },
        }
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

    fn named(name: &str) -> Role {
        Role::ALL.into_iter().find(|role| role.name() == name).expect("one of the choices")
    }
}

/// What the table of keys promises.
impl Values {
    fn text(&self, name: &str) -> Option<String> {
        match self.get(name)? {
            Value::Text(text) => Some(text.clone()),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn defaulted(&self, name: &str) -> String {
        self.text(name).expect("has a default")
    }

    fn words(&self, name: &str) -> &[String] {
        match self.get(name) {
            Some(Value::Words(words)) => words,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn whole(&self, name: &str) -> u32 {
        match self.get(name) {
            Some(Value::Whole(whole)) => *whole,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn duration(&self, name: &str) -> Duration {
        match self.get(name) {
            Some(Value::Duration(duration)) => *duration,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn listen(&self, name: &str) -> SocketAddr {
        match self.get(name) {
            Some(Value::Listen(address)) => *address,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn time(&self, name: &str) -> Option<DateTime<Utc>> {
        match self.get(name)? {
            Value::Time(time) => Some(*time),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn id(&self, name: &str) -> Option<Uuid> {
        match self.get(name)? {
            Value::Id(id) => Some(*id),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn secret(&self, name: &str) -> Option<Secret> {
        match self.get(name)? {
            Value::Secret(secret) => Some(secret.clone()),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn secrets(&self, name: &str) -> BTreeMap<String, Secret> {
        let secret = |value: &Value| if let Value::Secret(secret) = value { Some(secret.clone()) } else { None };
        self.table(name).filter_map(|(entry, value, _)| Some((entry.to_owned(), secret(value)?))).collect()
    }

    fn tokens(&self, name: &str) -> BTreeMap<String, TokenSetting> {
        let token = |value: &Value| if let Value::Token(token) = value { Some(token.clone()) } else { None };
        self.table(name).filter_map(|(entry, value, _)| Some((entry.to_owned(), token(value)?))).collect()
    }

    fn texts(&self, name: &str) -> BTreeMap<String, String> {
        let text = |value: &Value| if let Value::Text(text) = value { Some(text.clone()) } else { None };
        self.table(name).filter_map(|(entry, value, _)| Some((entry.to_owned(), text(value)?))).collect()
    }
}
