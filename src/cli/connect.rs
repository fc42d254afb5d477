//! Opens the ledger and the log of the settings. Errors contain the dependency, its address and
//! what to do.

use std::collections::BTreeMap;
use std::str::FromStr as _;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Exit, Failure};
use crate::cause::{self, LastingFault};
use crate::clock::Clock;
use crate::config::{LogKind, Pipeline, Secret};
use crate::event::{Signatures, Topic};
use crate::ledger::{Ledger, LedgerSettings};
use crate::log::{KafkaSettings, Log, PostgresLogSettings};
use crate::retry::Backoff;

/// Timeout of one connection test.
const REACH_SECONDS: u64 = 5;

/// A ledger that may still be unreachable, with its address for messages.
#[derive(Clone)]
pub struct LedgerAt {
    /// The handle. It opens connections when they are needed.
    pub ledger: Ledger,
    /// `HOST:PORT/DATABASE as USER`, without the password.
    pub address: String,
}

/// A log that may still be unreachable, with its address for messages.
#[derive(Clone, Debug)]
pub struct LogAt {
    pub log: Log,
    /// `Kafka at HOST:PORT,…`, or the ledger's address.
    pub address: String,
}

/// Resolves a secret.
///
/// # Errors
/// [`Exit::Configuration`] with the key and the origin of the secret.
pub async fn secret(key: &str, secret: &Secret) -> Result<String, Failure> {
    secret
        .resolve()
        .await
        .map_err(|error| Failure::of(Exit::Configuration, format!("{key}: {error}")))
}

/// Opens the pipeline's ledger without connecting.
///
/// # Errors
/// [`Exit::Configuration`] if the secret cannot be resolved or is not a PostgreSQL URL.
pub async fn open_ledger(pipeline: &Pipeline, clock: Clock) -> Result<LedgerAt, Failure> {
    let url = secret("ledger.url", &pipeline.ledger.url).await?;
    let named = PgConnectOptions::from_str(&url).map_err(|_| {
        Failure::of(
            Exit::Configuration,
            format!("ledger.url {}: not a PostgreSQL URL; expected postgres://USER:PASSWORD@HOST:PORT/DATABASE", pipeline.ledger.url.origin()),
        )
    })?;
    let database = named.get_database().unwrap_or_else(|| named.get_username());
    let address =
        format!("{}:{}/{database} as {}", named.get_host(), named.get_port(), named.get_username());
    let ledger =
        Ledger::open(&LedgerSettings { url, connections: pipeline.ledger.connections }, clock)?;
    Ok(LedgerAt { ledger, address })
}

/// Opens the pipeline's ledger; checks the connection and the schema.
pub async fn ledger(pipeline: &Pipeline, clock: Clock) -> Result<Ledger, Failure> {
    let at = open_ledger(pipeline, clock).await?;
    at.reach().await?;
    Ok(at.ledger)
}

impl LedgerAt {
    /// Tests once, for at most 5 s, whether PostgreSQL answers.
    pub async fn reach_server(&self) -> Result<(), Failure> {
        let answered =
            tokio::time::timeout(Duration::from_secs(REACH_SECONDS), self.ledger.reach()).await;
        let grant = |error| cause::connect_grant(error, &self.ledger.pool.connect_options());
        let (problem, grant) = match answered {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => (cause::text(&error), grant(&error)),
            Err(_) => (format!("no answer within {REACH_SECONDS} s"), None),
        };
        let advice = match grant {
            Some(grant) => format!("let an administrator run:\n{grant}"),
            None => {
                "is it started, and are ledger.url, the database and its user right?".to_owned()
            }
        };
        Err(Failure::of(
            Exit::Unreachable,
            format!(
                "the ledger's PostgreSQL at {} cannot be used: {problem}; {advice}",
                self.address
            ),
        ))
    }

    /// Tests once whether PostgreSQL answers and the schema fits this binary.
    ///
    /// # Errors
    /// [`Exit::Unreachable`], or [`Exit::Refused`] if the schema is newer.
    pub async fn reach(&self) -> Result<(), Failure> {
        self.reach_server().await?;
        Ok(self.ledger.check_schema().await?)
    }

    /// Waits until the ledger is usable, and logs why it is not. Also waits for a schema that is
    /// not migrated yet.
    ///
    /// # Errors
    /// A failure that waiting cannot end, or [`Exit::Interrupted`].
    pub async fn wait(&self, stop: &CancellationToken) -> Result<(), Failure> {
        until_reached("ledger", stop, || self.reach()).await
    }
}

/// Opens the pipeline's log without connecting.
///
/// # Errors
/// [`Exit::Configuration`] if a secret cannot be resolved, or if a property is unknown or wrong.
pub async fn open_log(pipeline: &Pipeline, at: &LedgerAt) -> Result<LogAt, Failure> {
    let signatures = signatures(pipeline).await?;
    if pipeline.log.kind == LogKind::Postgres {
        let log = Log::postgres(
            at.ledger.pool.clone(),
            PostgresLogSettings { signatures, ..PostgresLogSettings::default() },
        );
        return Ok(LogAt { log, address: format!("PostgreSQL at {}", at.address) });
    }
    let brokers = pipeline.kafka.brokers.clone().unwrap_or_default();
    let mut properties = BTreeMap::new();
    for (name, value) in &pipeline.kafka.properties {
        properties.insert(name.clone(), property(name, value).await?);
    }
    let topic_prefix = pipeline.kafka.topic_prefix.clone();
    let log = Log::kafka(KafkaSettings {
        topic_prefix,
        properties,
        signatures,
        ..KafkaSettings::new(&brokers)
    })?;
    Ok(LogAt { log, address: format!("Kafka at {brokers}") })
}

/// Resolves the keys for signatures of records.
async fn signatures(pipeline: &Pipeline) -> Result<Signatures, Failure> {
    let mut keys = BTreeMap::new();
    for (name, key) in &pipeline.log.verification_keys {
        keys.insert(
            name.clone(),
            secret(&format!("log.verification_keys.{name}"), key).await?.into_bytes(),
        );
    }
    let signatures = Signatures::new(keys, pipeline.log.signing_key.clone());
    signatures.map_err(|problem| {
        Failure::of(Exit::Configuration, format!("log.verification_keys: {problem}"))
    })
}

/// Resolves the value of a property. librdkafka accepts an empty literal; any other empty secret is
/// a mistake.
async fn property(name: &str, value: &Secret) -> Result<String, Failure> {
    if value.is_empty_literal() {
        Ok(String::new())
    } else {
        secret(&format!("kafka.properties.{name}"), value).await
    }
}

impl LogAt {
    /// Tests once whether the log answers and the topics exist.
    pub async fn reach(&self) -> Result<(), Failure> {
        for topic in Topic::ALL {
            self.log.partitions(topic).await.map_err(|error| {
                Failure::from(error).while_doing(format!("the log, {}", self.address))
            })?;
        }
        Ok(())
    }

    /// Waits until the log answers, and logs why it does not.
    ///
    /// # Errors
    /// A failure that waiting cannot end, or [`Exit::Interrupted`].
    pub async fn wait(&self, stop: &CancellationToken) -> Result<(), Failure> {
        until_reached("log", stop, || self.reach()).await
    }
}

/// Repeats the test with growing pauses. Logs each new reason once.
async fn until_reached<F>(
    what: &'static str,
    stop: &CancellationToken,
    look: impl Fn() -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + Send,
{
    let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut logged = LastingFault::default();
    loop {
        match stop.run_until_cancelled(look()).await {
            None => return Err(Failure::interrupted()),
            Some(Ok(())) => break,
            Some(Err(failure)) if failure.exit == Exit::Unreachable => {
                let reason = failure.text();
                if logged.is_new(&reason) {
                    warn!(waiting_for = what, "{reason}; waiting");
                }
            }
            Some(Err(failure)) => return Err(failure),
        }
        if !waits.wait(stop).await {
            return Err(Failure::interrupted());
        }
    }
    if logged.end() {
        info!(waited_for = what, "reached");
    }
    Ok(())
}
