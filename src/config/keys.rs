//! The only table of keys. The typed [`super::Pipeline`] is read from it, and a test compares the
//! shipped files with it.

#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Full name, `section.key`.
    pub name: &'static str,
    /// Kind of its value.
    pub kind: Kind,
    /// Default value, in the notation of a flag; `None` without a default.
    pub default: Option<&'static str>,
    /// Effect of the setting, in one line. The shipped files repeat it as a comment.
    pub doc: &'static str,
}

/// Kind of a value.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One or more of these words, each once.
    Choices(&'static [&'static str]),
    /// A whole number, with inclusive minimum and maximum.
    Whole(u32, u32),
    /// Seconds, possibly with a fraction, with inclusive minimum and maximum.
    Seconds(f64, f64),
    /// An instant in RFC 3339.
    Time,
    /// A UUID.
    Id,
    /// A Kafka name of letters, digits, `.`, `_`, `-`, with minimum and maximum length.
    Name(usize, usize),
    /// A list of `host:port`, separated by commas.
    Brokers,
    /// An http or https URL without credentials.
    Url,
    /// `address:port` of a listener.
    Listen,
    /// Host names or IP addresses, each once, without ports.
    HostNames,
    /// A PostgreSQL URL; secret because it may contain a password.
    SecretPostgresUrl,
    /// A table from the name of a public key to the key, or to `file:PATH`.
    PublicKeys,
    /// A table of librdkafka's properties. Each value is a secret.
    Properties,
    /// A table from the name of a token to its scope and secret.
    Tokens,
    /// A table from the name of a signature key to its secret.
    SignatureKeys,
}

const fn key(
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    doc: &'static str,
) -> Key {
    Key { name, kind, default, doc }
}

pub const KEYS: &[Key] = &[
    key(
        "roles",
        Kind::Choices(&["collect", "consume", "publish", "serve"]),
        Some("collect,consume,publish,serve"),
        "The roles of this process under `tallyline run`.",
    ),
    key(
        "ledger.url",
        Kind::SecretPostgresUrl,
        None,
        "The ledger's database, postgres://USER:PASSWORD@HOST:PORT/DATABASE (PostgreSQL 14 or newer). Secret.",
    ),
    key(
        "ledger.connections",
        Kind::Whole(2, 500),
        None,
        "Maximum connections of this process to the ledger. Default: 5, plus collect 1, consume 4, publish 2, serve 3 for each of its roles.",
    ),
    key(
        "log.kind",
        Kind::Choice(&["postgres", "kafka"]),
        Some("postgres"),
        "The log's backend: postgres (tables in the ledger's database) or kafka.",
    ),
    key(
        "log.partitions",
        Kind::Whole(1, 1000),
        Some("6"),
        "Partitions of a new topic. An existing topic is never changed.",
    ),
    key(
        "log.group",
        Kind::Name(1, 200),
        Some("tallyline"),
        "The consumer group whose members share the partitions. A group belongs to one ledger.",
    ),
    key(
        "log.signing_key",
        Kind::Name(1, 100),
        None,
        "The name of the verification key with which this process signs records. Default: records are not signed.",
    ),
    key(
        "log.verification_keys",
        Kind::SignatureKeys,
        None,
        "Keys that verify signatures of records, by name: secrets of at least 32 bytes. Default: records are not verified.",
    ),
    key(
        "kafka.brokers",
        Kind::Brokers,
        None,
        "Kafka's brokers: host:port, separated by commas. Required if log.kind is kafka.",
    ),
    key(
        "kafka.topic_prefix",
        Kind::Name(0, 100),
        Some(""),
        "Prefix of every topic and group name.",
    ),
    key(
        "kafka.properties",
        Kind::Properties,
        None,
        "Properties passed to librdkafka, such as those for TLS and SASL. Each value may be a secret.",
    ),
    key(
        "source.coderd_url",
        Kind::SecretPostgresUrl,
        None,
        "coderd's own database, which is only read. Secret. Required by the roles collect and publish.",
    ),
    key(
        "source.deployment_id",
        Kind::Id,
        None,
        "coderd's deployment id: `select tallyline.deployment_id()` in its database returns it. Default: read from coderd.",
    ),
    key(
        "source.introduced_at",
        Kind::Time,
        None,
        "Histograms contain builds completed from this instant on. Default: when the source is first collected. Fixed once it is in the ledger.",
    ),
    key(
        "source.backfill_from",
        Kind::Time,
        None,
        "Builds completed before this instant are counted once into a baseline and not collected. Default: all history is collected.",
    ),
    key(
        "collect.poll_seconds",
        Kind::Seconds(0.05, 3600.0),
        Some("5"),
        "Interval between two passes over coderd's database.",
    ),
    key(
        "collect.margin_seconds",
        Kind::Seconds(0.0, 3600.0),
        Some("60"),
        "A pass reports completeness up to this long before the database's time. Set more than the clocks of coderd's replicas differ.",
    ),
    key(
        "consume.stall_seconds",
        Kind::Seconds(1.0, 3600.0),
        Some("60"),
        "A consumer rejoins its group if a partition does not move for this long while records wait.",
    ),
    key(
        "retention.reject_payload_days",
        Kind::Whole(0, 36_500),
        Some("180"),
        "Days for which headers and body of a reject are kept after an act ended it. 0: for ever. Open rejects are kept.",
    ),
    key(
        "retention.attempt_days",
        Kind::Whole(0, 36_500),
        Some("400"),
        "Days for which attempts to publish, and errors of requests, are kept after all events of the request were settled. 0: for ever.",
    ),
    key(
        "license.public_keys",
        Kind::PublicKeys,
        None,
        "Ed25519 public keys that verify licenses, by name (kid): PEM, 32 bytes in base64 or hex, or file:PATH. Default: every license is refused.",
    ),
    key(
        "license.rules",
        Kind::Choice(&["2025-07", "2026-02"]),
        Some("2025-07"),
        "The version of coderd's rules that turn licenses into limits, by month.",
    ),
    key(
        "publish.mode",
        Kind::Choice(&["shadow", "sole"]),
        Some("shadow"),
        "shadow sends nothing and compares with coderd. sole sends usage, and coderd's own publishing must be blocked.",
    ),
    key(
        "publish.url",
        Kind::Url,
        Some("https://tallyman-prod.coder.com/api/v1/events/ingest"),
        "Tallyman's ingest endpoint.",
    ),
    key(
        "publish.interval_seconds",
        Kind::Seconds(0.05, 3600.0),
        Some("10"),
        "Interval between two checks for due usage.",
    ),
    key(
        "publish.request_timeout_seconds",
        Kind::Seconds(1.0, 300.0),
        Some("30"),
        "Timeout of a request to Tallyman. The events of a killed publisher are sent again within twice this time.",
    ),
    key(
        "publish.concurrency",
        Kind::Whole(1, 32),
        Some("4"),
        "Maximum requests in flight to Tallyman, each with up to 100 events.",
    ),
    key(
        "audit.interval_seconds",
        Kind::Seconds(0.2, 86_400.0),
        Some("300"),
        "Interval between two audits. An audit uses at most about a tenth of the time. A difference can hold usage back.",
    ),
    key(
        "audit.late_after_intervals",
        Kind::Whole(1, 1000),
        Some("3"),
        "Intervals without an audit of a comparison after which it holds publishing. An audit that takes over a tenth of the interval extends it.",
    ),
    key(
        "serve.api_listen",
        Kind::Listen,
        Some("127.0.0.1:8090"),
        "Address of the API. Only loopback, until TLS is supported.",
    ),
    key(
        "serve.metrics_listen",
        Kind::Listen,
        Some("127.0.0.1:2112"),
        "Address of /metrics. Only loopback, until TLS is supported.",
    ),
    key(
        "serve.host_names",
        Kind::HostNames,
        None,
        "Host names of this machine, besides loopback's, that clients of a proxy use. Without tokens, requests with another Host are refused.",
    ),
    key(
        "serve.tokens",
        Kind::Tokens,
        None,
        "API tokens: name to \"SCOPE SECRET\", with scope enforce (license questions), read or admin. Default: loopback may read.",
    ),
    key(
        "telemetry.listen",
        Kind::Listen,
        None,
        "Address of telemetry, /healthz and /readyz of a process without the role serve. Default: no listener. Only loopback.",
    ),
];

impl Key {
    /// The key with this name. For an entry of a table, such as `serve.tokens.x`, the key of the
    /// table.
    pub(super) fn of(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name).or_else(|| {
            KEYS.iter().find(|key| {
                key.kind.is_table()
                    && name
                        .strip_prefix(key.name)
                        .is_some_and(|rest| rest.len() > 1 && rest.starts_with('.'))
            })
        })
    }

    /// The name of its variable, such as `TALLYLINE_LEDGER_URL` for `ledger.url`.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("TALLYLINE_{}", self.name.to_uppercase().replace(['.', '-'], "_"))
    }
}

impl Kind {
    pub(super) fn is_table(self) -> bool {
        matches!(self, Kind::PublicKeys | Kind::Properties | Kind::Tokens | Kind::SignatureKeys)
    }

    /// Whether a value may contain a secret.
    #[must_use]
    pub fn may_be_secret(self) -> bool {
        matches!(
            self,
            Kind::SecretPostgresUrl | Kind::Properties | Kind::Tokens | Kind::SignatureKeys
        )
    }

    /// The allowed values, to follow "must be".
    #[must_use]
    pub fn allowed(self) -> String {
        match self {
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Choices(words) => format!("a list of {}, each at most once", words.join(", ")),
            Kind::Whole(least, most) => format!("a whole number from {least} to {most}"),
            Kind::Seconds(least, most) => format!("a number of seconds from {least} to {most}"),
            Kind::Time => "an instant such as 2025-07-01T00:00:00Z".into(),
            Kind::Id => "a UUID".into(),
            Kind::Name(least, most) => {
                format!("{least} to {most} letters, digits, '.', '_' or '-'")
            }
            Kind::Brokers => "host:port, separated by commas".into(),
            Kind::Url => {
                "an http:// or https:// URL with a host and without user and password".into()
            }
            Kind::Listen => "an address and port such as 127.0.0.1:8090".into(),
            Kind::HostNames => "a list of host names or IP addresses, without ports".into(),
            Kind::SecretPostgresUrl => {
                "a postgres:// URL with a host and a database, env:NAME, file:PATH or exec:COMMAND"
                    .into()
            }
            Kind::PublicKeys => "a table of names and public keys".into(),
            Kind::Properties => "a table of librdkafka's properties".into(),
            Kind::Tokens => "a table of names and \"SCOPE SECRET\"".into(),
            Kind::SignatureKeys => "a table of names and secrets".into(),
        }
    }
}
