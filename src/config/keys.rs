//! The only table of keys. The typed [`super::Pipeline`] is read from it, and a test compares the shipped files with it.

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
    /// Hours, possibly with a fraction, with inclusive minimum and maximum.
    Hours(f64, f64),
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

const fn key(name: &'static str, kind: Kind, default: Option<&'static str>, doc: &'static str) -> Key {
    Key { name, kind, default, doc }
}

pub const KEYS: &[Key] = &[
    key(
        "roles",
        Kind::Choices(&["collect", "consume", "publish", "serve"]),
        Some("collect,consume,publish,serve"),
        "What `tallyline run` does in this process.",
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
        "Most connections of this process to the ledger; without it, 4 and what its roles need: collect 1, consume 4, publish 1, serve 3.",
    ),
    key("log.kind", Kind::Choice(&["postgres", "kafka"]), Some("postgres"), "Where the log is: tables in the ledger's database, or Kafka."),
    key(
        "log.partitions",
        Kind::Whole(1, 1000),
        Some("6"),
        "Partitions of each topic when it is created; a topic that is there is never changed.",
    ),
    key("log.group", Kind::Name(1, 200), Some("tallyline"), "The group whose members share the partitions. It belongs to one ledger."),
    key(
        "log.signing_key",
        Kind::Name(1, 100),
        None,
        "The name of the verification key with which this process signs what it appends; without it, records are not signed.",
    ),
    key(
        "log.verification_keys",
        Kind::SignatureKeys,
        None,
        "Keys that verify signatures of records, by name: secrets of at least 32 bytes. Without any, records are not verified.",
    ),
    key("kafka.brokers", Kind::Brokers, None, "Where Kafka is: host:port, separated by commas. Needed when log.kind is kafka."),
    key("kafka.topic_prefix", Kind::Name(0, 100), Some(""), "Put before every topic and group name."),
    key(
        "kafka.properties",
        Kind::Properties,
        None,
        "librdkafka's properties for TLS, SASL and the like, passed through; each value may be a secret.",
    ),
    key(
        "source.coderd_url",
        Kind::SecretPostgresUrl,
        None,
        "coderd's own database, read only. Secret. Needed by the roles collect and publish.",
    ),
    key(
        "source.deployment_id",
        Kind::Id,
        None,
        "coderd's own deployment id, which `select tallyline.deployment_id()` in its database shows; without it, coderd is asked.",
    ),
    key(
        "source.introduced_at",
        Kind::Time,
        None,
        "Histograms hold builds completed at or after this instant; without it, when the source is first seen. Fixed once it is in the ledger.",
    ),
    key(
        "source.backfill_from",
        Kind::Time,
        None,
        "Builds completed before this instant are counted once into a baseline and not collected; without it, all history is collected.",
    ),
    key("collect.poll_seconds", Kind::Seconds(0.05, 3600.0), Some("5"), "How often coderd's database is looked at."),
    key(
        "collect.margin_seconds",
        Kind::Seconds(0.0, 3600.0),
        Some("60"),
        "How far before the database's now a pass claims to be complete: more than its clocks differ.",
    ),
    key("collect.full_sweep_hours", Kind::Hours(0.01, 168.0), Some("24"), "How often everything is compared again, whatever its time."),
    key(
        "consume.stall_seconds",
        Kind::Seconds(1.0, 3600.0),
        Some("60"),
        "A consumer that does not move for so long while records wait leaves its group and joins again.",
    ),
    key(
        "license.public_keys",
        Kind::PublicKeys,
        None,
        "Ed25519 public keys that sign licenses, by name (kid): PEM, 32 bytes in base64, or file:PATH. Without any, every license is refused.",
    ),
    key(
        "license.rules",
        Kind::Choice(&["2025-07", "2026-02"]),
        Some("2025-07"),
        "How licenses become limits: coderd's rules as of that month.",
    ),
    key(
        "publish.mode",
        Kind::Choice(&["shadow", "sole"]),
        Some("shadow"),
        "shadow sends nothing and compares with coderd; sole sends, and coderd's own publishing must be cut off.",
    ),
    key("publish.url", Kind::Url, Some("https://tallyman-prod.coder.com/api/v1/events/ingest"), "Tallyman's ingest endpoint."),
    key("publish.interval_seconds", Kind::Seconds(0.05, 3600.0), Some("10"), "How often due usage is looked for."),
    key(
        "publish.request_timeout_seconds",
        Kind::Seconds(1.0, 300.0),
        Some("30"),
        "How long Tallyman may take to answer. A killed publisher's events are sent again within twice that.",
    ),
    key("serve.api_listen", Kind::Listen, Some("127.0.0.1:8090"), "Where the API listens. Loopback only until TLS is there."),
    key("serve.metrics_listen", Kind::Listen, Some("127.0.0.1:2112"), "Where /metrics listens. Loopback only until TLS is there."),
    key(
        "serve.audit_seconds",
        Kind::Seconds(0.2, 86_400.0),
        Some("300"),
        "How often the books are audited; never more than about a tenth of the time. What differs may hold usage back.",
    ),
    key(
        "serve.host_names",
        Kind::HostNames,
        None,
        "Names, beside loopback's own, by which a proxy's clients ask for this machine. Without tokens, a request for another name is refused.",
    ),
    key(
        "serve.tokens",
        Kind::Tokens,
        None,
        "Who may ask over HTTP: name to \"SCOPE SECRET\", the scope enforce (license questions), read or admin. Without any, loopback may read.",
    ),
    key(
        "telemetry.listen",
        Kind::Listen,
        None,
        "Where a process without the role serve shows its own telemetry, /healthz and /readyz; without it, nowhere. Loopback only.",
    ),
];

impl Key {
    /// The key with this name. For an entry of a table, such as `serve.tokens.x`, the key of the table.
    pub(super) fn of(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name).or_else(|| {
            KEYS.iter()
                .find(|key| key.kind.is_table() && name.strip_prefix(key.name).is_some_and(|rest| rest.len() > 1 && rest.starts_with('.')))
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

    /// The allowed values, to follow "must be".
    #[must_use]
    pub fn allowed(self) -> String {
        match self {
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Choices(words) => format!("a list of {}, each at most once", words.join(", ")),
            Kind::Whole(least, most) => format!("a whole number from {least} to {most}"),
            Kind::Seconds(least, most) => format!("a number of seconds from {least} to {most}"),
            Kind::Hours(least, most) => format!("a number of hours from {least} to {most}"),
            Kind::Time => "an instant such as 2025-07-01T00:00:00Z".into(),
            Kind::Id => "a UUID".into(),
            Kind::Name(least, most) => format!("{least} to {most} letters, digits, '.', '_' or '-'"),
            Kind::Brokers => "host:port, separated by commas".into(),
            Kind::Url => "an http:// or https:// URL with a host and without user and password".into(),
            Kind::Listen => "an address and port such as 127.0.0.1:8090".into(),
            Kind::HostNames => "a list of host names or IP addresses, without ports".into(),
            Kind::SecretPostgresUrl => "a postgres:// URL with a host and a database, env:NAME, file:PATH or exec:COMMAND".into(),
            Kind::PublicKeys => "a table of names and public keys".into(),
            Kind::Properties => "a table of librdkafka's properties".into(),
            Kind::Tokens => "a table of names and \"SCOPE SECRET\"".into(),
            Kind::SignatureKeys => "a table of names and secrets".into(),
        }
    }
}
