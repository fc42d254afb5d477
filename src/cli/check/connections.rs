//! Tests connections and rights of a pipeline without changing anything. Tests neither Tallyman nor
//! any write access to Kafka.

use std::time::Duration;

use chrono::SecondsFormat;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::line::Line;
use crate::cli::connect::{self, LedgerAt};
use crate::cli::{Exit, Failure, roles::Handles};
use crate::clock::Clock;
use crate::coderd::{CoderdError, Database, IdentityFacts, Reader};
use crate::config::{LogKind, Pipeline, PublishMode};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{LedgerError, ReportedIdentity, cutover, identity, rights};
use crate::log::{Log, LogError};
use crate::retry::Backoff;

/// Maximum wait for the coordinator of a consumer group.
const GROUP_WITHIN: Duration = Duration::from_secs(10);

/// Mistakes, and settings that work less well than they could.
#[derive(Default)]
pub(super) struct Found {
    pub mistakes: Vec<Line>,
    pub warnings: Vec<String>,
    /// Whether records must be signed because the ledger has a cutover.
    pub signed: bool,
    /// Number of mistakes that are unreachable servers.
    unreachable: usize,
}

impl Found {
    fn mistake(&mut self, key: &str, problem: impl std::fmt::Display) {
        self.mistakes.push(Line {
            place: "connection".to_owned(),
            key: Some(key.to_owned()),
            problem: problem.to_string(),
        });
    }

    fn failure(&mut self, key: &str, failure: &Failure) {
        self.unreachable += usize::from(failure.exit == Exit::Unreachable);
        self.mistake(key, format!("{:#}", failure.error));
    }

    /// Whether unreachable servers are the only mistakes.
    pub fn is_unreachable(&self) -> bool {
        self.unreachable > 0 && self.unreachable == self.mistakes.len()
    }
}

/// Tests the ledger, the log and coderd.
pub(super) async fn check(pipeline: Pipeline, clock: Clock) -> Found {
    let mut found = Found::default();
    let configured = pipeline.clone();
    let ledger = match connect::open_ledger(&pipeline, clock.clone()).await {
        Ok(ledger) => ledger,
        Err(failure) => {
            found.failure("ledger.url", &failure);
            return found;
        }
    };
    let current = check_ledger(&ledger, &mut found).await;
    if current {
        check_keys(&pipeline, &ledger, &mut found).await;
    }
    if pipeline.log.kind == LogKind::Kafka {
        check_kafka(&pipeline, &ledger, &mut found).await;
    }
    match Handles::open(pipeline, clock).await {
        Ok(Handles { coderd: Some(database), .. }) => {
            check_coderd(&configured, &database, &ledger, current, &mut found).await
        }
        Ok(Handles { coderd: None, .. }) => {}
        Err(failure) => found.failure("source.coderd_url", &failure),
    }
    found
}

/// Whether the ledger is readable and has the schema of this binary.
async fn check_ledger(at: &LedgerAt, found: &mut Found) -> bool {
    if let Err(failure) = at.reach_server().await {
        found.failure("ledger.url", &failure);
        return false;
    }
    let (current, creates) = match at.ledger.check_schema().await {
        Ok(()) => (true, false),
        Err(error @ LedgerError::SchemaTooOld { .. }) => {
            found.warnings.push(error.to_string());
            (false, true)
        }
        Err(error @ LedgerError::CoderdDatabase) => {
            found.mistake("ledger.url", error);
            return false;
        }
        // missing rights are listed below
        Err(LedgerError::MissingRights(_)) => (false, false),
        Err(error) => {
            found.mistake("ledger.url", error);
            (false, false)
        }
    };
    match at.ledger.run(async |conn| rights::missing(conn, creates).await).await {
        Ok(statements) => {
            statements.iter().for_each(|statement| found.mistake("ledger.url", statement))
        }
        Err(error) => found.mistake("ledger.url", error),
    }
    current
}

/// Checks that the process has the keys that the ledger's cutover requires.
async fn check_keys(pipeline: &Pipeline, at: &LedgerAt, found: &mut Found) {
    let since = match at.ledger.run(cutover::signed_since).await {
        Ok(Some(since)) => since.to_rfc3339_opts(SecondsFormat::Secs, true),
        Ok(None) => return,
        Err(error) => return found.failure("ledger.url", &error.into()),
    };
    found.signed = true;
    if pipeline.log.verification_keys.is_empty() {
        found.mistake(
            "log.verification_keys",
            format!("records must be signed since {since}: without keys, no record is read"),
        );
    }
    if pipeline.log.signing_key.is_none() {
        found.mistake("log.signing_key", format!("records must be signed since {since}: without it, the role collect refuses to collect"));
    }
}

/// Tests the brokers, and the rights to describe the topics and the group and to read a record.
async fn check_kafka(pipeline: &Pipeline, ledger: &LedgerAt, found: &mut Found) {
    let at = match connect::open_log(pipeline, ledger).await {
        Ok(at) => at,
        Err(failure) => return found.failure("kafka", &failure),
    };
    let mut missing = Vec::new();
    for topic in Topic::ALL {
        match read_record(&at.log, topic).await {
            Ok(()) => {}
            Err(LogError::NoTopic(topic)) => missing.push(topic.name()),
            Err(error) => {
                let failure = Failure::from(error)
                    .while_doing(format!("{}: {topic} cannot be read", at.address));
                return found.failure("kafka.brokers", &failure);
            }
        }
    }
    if !missing.is_empty() {
        found.warnings.push(format!(
            "{} has no topic {}: run `tallyline migrate`",
            at.address,
            missing.join(", ")
        ));
    } else if let Err(error) = describe_group(&at.log, &pipeline.log.group).await {
        found.mistake(
            "log.group",
            format!("{}: the group cannot be described: {error}", at.address),
        );
    }
}

/// For the first seconds after its start, a broker has no coordinator for the group.
async fn describe_group(log: &Log, group: &str) -> Result<(), LogError> {
    let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
    let until = Instant::now() + GROUP_WITHIN;
    loop {
        match log.marks(group).await {
            Err(LogError::Unreachable(_)) if Instant::now() < until => {}
            answer => return answer.map(drop),
        }
        waits.wait(&CancellationToken::new()).await;
    }
}

/// Reads the first record of a topic, if there is one.
async fn read_record(log: &Log, topic: Topic) -> Result<(), LogError> {
    for partition in log.partitions(topic).await? {
        let partition = TopicPartition { topic, partition };
        let (start, _) = log.watermarks(partition).await?;
        if !log.read(partition, start, 1).await?.is_empty() {
            return Ok(());
        }
    }
    Ok(())
}

/// Tests coderd's database: each right, and whether this coderd belongs to the source.
async fn check_coderd(
    pipeline: &Pipeline,
    database: &Database,
    ledger: &LedgerAt,
    current: bool,
    found: &mut Found,
) {
    let mut reader = match database.connect().await {
        Ok(reader) => reader,
        Err(error @ (CoderdError::Unreachable { .. } | CoderdError::Lost(_))) => {
            return found.failure("source.coderd_url", &Failure::new(Exit::Unreachable, error));
        }
        Err(error) => return found.mistake("source.coderd_url", error),
    };
    match reader.missing_rights().await {
        Ok(statements) => {
            statements.iter().for_each(|statement| found.mistake("source.coderd_url", statement))
        }
        Err(error) => found.mistake("source.coderd_url", error),
    }
    check_transactions(&mut reader, found).await;
    match reader.identity_facts().await {
        Ok(facts) => check_identity(pipeline, &facts, ledger, current, found).await,
        Err(error) => found.mistake("source.coderd_url", error),
    }
    reader.close().await;
}

async fn check_transactions(reader: &mut Reader, found: &mut Found) {
    // the list of rights contains the missing ones
    let Ok(catalog) = reader.catalog().await else { return };
    match reader.horizon(&catalog).await {
        Ok(horizon) if catalog.sees_transactions() && !horizon.sees_all => found.warnings.push(
            "coderd's open transactions are not all visible, so nothing is reported as complete: this is a hot standby, track_activities is \
             off, or src/coderd/grants.sql was not run by a superuser or a member of pg_read_all_stats"
                .to_owned(),
        ),
        Ok(_) => {}
        Err(error) => found.mistake("source.coderd_url", error),
    }
}

/// Checks that no identity fact contradicts the source, and that both are known.
async fn check_identity(
    pipeline: &Pipeline,
    facts: &IdentityFacts,
    ledger: &LedgerAt,
    current: bool,
    found: &mut Found,
) {
    let reported = ReportedIdentity::from(facts);
    let refusal = match pipeline.source.deployment_id.or(facts.deployment_id) {
        Some(source_id) if current => {
            ledger
                .ledger
                .run(async |conn| identity::refusal_of(conn, source_id, reported).await)
                .await
        }
        // a new ledger has no registered source
        Some(source_id) => Ok(reported.refusal_of_new(source_id)),
        None => Ok(None),
    };
    match refusal {
        Ok(None) => {}
        Ok(Some(refusal)) => found.mistake("source.deployment_id", refusal),
        Err(error) => found.mistake("ledger.url", error),
    }
    match &facts.problem {
        None => {}
        Some(problem) if pipeline.publish.mode == PublishMode::Shadow => {
            found
                .warnings
                .push(format!("whether coderd is the one of the source is not certain: {problem}"));
        }
        Some(problem) => found.mistake("publish.mode", format!("sole refuses to start: {problem}")),
    }
}
