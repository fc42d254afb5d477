//! A site that has run for long: coderd's database with many jobs, and a ledger that has collected
//! them. Three rows share it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use chrono::TimeDelta;
use prometheus::Registry;
use sqlx::{Connection as _, PgConnection};
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::ledger::{Ledger, LedgerSettings};
use tallyline::log::{KafkaSettings, Log};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::Suite;
use crate::coderd::Coderd;
use crate::process::{Pipeline, Process};
use crate::servers::{Database, Servers};

/// The role of the collector's statements.
pub const COLLECT_ROLE: &str = "bench_collect";
/// The role of the audit's statements.
pub const AUDIT_ROLE: &str = "bench_audit";

/// Longer than the collection of a million jobs takes.
const DEADLINE: Duration = Duration::from_secs(900);
/// Events of one batch of older history.
const BATCH: i64 = 5_000;

pub struct History {
    pub coderd: Coderd,
    pub ledger: Database,
    /// The prefix of the topics in Kafka.
    pub prefix: String,
    /// Jobs in coderd's database when it was filled.
    pub jobs: i64,
    /// The number of the next build of coderd's traffic.
    pub next_build: i64,
    /// Builds in the ledger, without later traffic.
    builds: i64,
    brokers: String,
}

impl History {
    /// The history of this run; the first row that needs it makes it.
    pub async fn of<'a>(suite: &Suite, shared: &'a mut Option<History>) -> Result<&'a mut History> {
        if shared.is_none() {
            *shared = Some(History::new(&suite.servers, suite.size(1_000_000, 2_000)).await?);
        }
        shared.as_mut().context("the history was made")
    }

    /// Fills coderd's database with jobs of 60 days, and collects and consumes them.
    pub async fn new(servers: &Servers, jobs: i64) -> Result<History> {
        for role in [COLLECT_ROLE, AUDIT_ROLE] {
            servers.role(role).await?;
        }
        let (coderd, ledger) = (Coderd::new(servers, 20).await?, servers.ledger().await?);
        let days = TimeDelta::days(60);
        let step = days / i32::try_from(jobs)?;
        coderd.add_history(jobs, Clock::system().now() - days - TimeDelta::hours(1), step).await?;
        let history = History {
            coderd,
            ledger,
            prefix: format!("bench{}.", Uuid::new_v4().simple()),
            jobs,
            next_build: jobs,
            builds: jobs,
            brokers: servers.brokers.clone(),
        };
        let mut process = history.start(&["collect", "consume"])?;
        history
            .ledger
            .wait("a full sweep is in the ledger", DEADLINE, "select exists (select from collector_progress, completeness(source_id, null) done where done.swept_pass_id > 0)")
            .await?;
        process.stop().await?;
        vacuum(&history.ledger).await?;
        Ok(history)
    }

    /// Starts a process of the site. Its statements on coderd's database have the collector's role:
    /// it audits only if no audit has ended.
    pub fn start(&self, roles: &[&str]) -> Result<Process> {
        let pipeline = Pipeline::migrated(&format!(
            "ledger.url = '{}'\nlog.kind = 'kafka'\nkafka.brokers = '{}'\nkafka.topic_prefix = '{}'\nsource.coderd_url = '{}'\naudit.interval_seconds = 86400\n",
            self.ledger.url,
            self.brokers,
            self.prefix,
            self.coderd.database.url_of(COLLECT_ROLE)?,
        ))?;
        pipeline.start(roles, &[])
    }

    /// Runs the continuous audit of all joints in this process, until `stop`. Its statements have
    /// the audit's role.
    pub fn continuous_audit(
        &self,
        every: Duration,
        stop: &CancellationToken,
    ) -> Result<JoinHandle<()>> {
        let url = self.ledger.url_of(AUDIT_ROLE)?;
        let ledger = Ledger::open(&LedgerSettings { url, connections: 4 }, Clock::system())?;
        let settings = KafkaSettings {
            topic_prefix: self.prefix.clone(),
            ..KafkaSettings::new(&self.brokers)
        };
        let coderd = tallyline::coderd::Database::new(
            &self.coderd.database.url_of(AUDIT_ROLE)?,
            Duration::from_secs(60),
        )?;
        let audit = Audit {
            ledger,
            log: Log::kafka(settings)?,
            source: Some((coderd, self.coderd.simulation.deployment().id)),
            patience: Duration::from_secs(30),
        };
        let telemetry = AuditTelemetry::register(&Registry::new(), true)?;
        let continuous = Continuous {
            audit,
            every,
            late_after: 3,
            holder: Uuid::new_v4().to_string(),
            telemetry,
        };
        let stop = stop.clone();
        Ok(tokio::spawn(async move { continuous.run(&stop).await }))
    }

    /// Adds older builds to the ledger until it has this number. They are of an earlier generation
    /// of the topic, which was recreated, and coderd has purged their rows.
    pub async fn extend(&mut self, builds: i64) -> Result<()> {
        let more = (builds - self.builds) / BATCH * BATCH;
        if more <= 0 {
            return Ok(());
        }
        add_older_builds(&mut self.ledger.connect().await?, self.builds, more).await?;
        self.builds += more;
        vacuum(&self.ledger).await
    }
}

async fn vacuum(ledger: &Database) -> Result<()> {
    let mut connection = ledger.connect().await?;
    sqlx::raw_sql("vacuum analyze").execute(&mut connection).await?;
    sqlx::raw_sql("checkpoint").execute(&mut connection).await?;
    Ok(connection.close().await?)
}

/// Adds batches of 5,000 builds to a topic's earlier generation 0, in one transaction.
async fn add_older_builds(connection: &mut PgConnection, from: i64, more: i64) -> Result<()> {
    let mut tx = connection.begin().await?;
    let act: i64 = sqlx::query_scalar(
        "with batch as (insert into batch (kind, recorded_at) values ('operator', now()) returning id)
         insert into operator_act (batch_id, acted_at, actor, act, subject, reason)
         select id, now(), 'benchmark', 'recover', 'the log', 'the topic was recreated' from batch returning id",
    )
    .fetch_one(&mut *tx)
    .await?;
    sqlx::query(
        "insert into past_position (topic, partition, generation, start_offset, next_offset, records, act_id)
         values ('tallyline.workspace-builds.v1', 0, 0, $1, $1 + $2, $2, $3)
         on conflict (topic, partition, generation) do update
             set next_offset = excluded.next_offset, records = past_position.records + excluded.records",
    )
    .bind(from)
    .bind(more)
    .bind(act)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "insert into batch (kind, recorded_at, topic, partition, generation, first_offset, next_offset, records, accepted)
         select 'log', now(), 'tallyline.workspace-builds.v1', 0, 0, n, n + $3, $3, $3 from generate_series($1, $1 + $2 - 1, $3) n order by n",
    )
    .bind(from)
    .bind(more)
    .bind(BATCH)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "insert into workspace_build select source.id, md5('older' || n)::uuid, batch.id, n, sha256(n::text::bytea),
             md5('place' || n / 5)::uuid, md5('organization' || n % 3)::uuid, md5('template' || n / 5 % 12)::uuid,
             md5('version' || n / 5 % 12)::uuid, null, md5('owner' || n / 5 % 2000)::uuid, md5('owner' || n / 5 % 2000)::uuid,
             case when n % 5 in (1, 3) then 'stop' else 'start' end, 'initiator', 'succeeded', n % 5 + 1, null, false, null, n % 5 = 0,
             null, false, 10, done.at - interval '61 seconds', done.at - interval '60 seconds', done.at,
             'organization-' || n % 3, 'template-' || n / 5 % 12, 'release-1', '', 'workspace-' || n / 5, 'user-' || n / 5 % 2000, now()
         from source, generate_series($1, $1 + $2 - 1) n
         join batch on batch.generation = 0 and batch.first_offset = $1 + (n - $1) / $3 * $3
         cross join lateral (select timestamptz '2026-01-01' + n * interval '1 second' as at) done",
    )
    .bind(from)
    .bind(more)
    .bind(BATCH)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "insert into workspace_first_start select source.id, md5('place' || n / 5)::uuid, md5('older' || n)::uuid
         from source, generate_series($1, $1 + $2 - 1) n where n % 5 = 0",
    )
    .bind(from)
    .bind(more)
    .execute(&mut *tx)
    .await?;
    Ok(tx.commit().await?)
}
