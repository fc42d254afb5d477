//! The cost of a round of the audit and of a collector's pass does not grow with the history.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::collectors::{Collector, Settings};
use tallyline::ledger::{Ledger, findings};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::{coderd, ledger};
use tallyline_sim::coderd::SchemaVersion;
use tokio_util::sync::CancellationToken;

use crate::audit::SOURCE;
use crate::support::coderd::Coderd;
use crate::support::eventually;
use crate::support::ledger::ledger_at;

/// A coderd and a ledger with the same completed builds, over 100 days, and half as many usage rows,
/// over 700 days.
struct Site {
    coderd: Coderd,
    ledger: Ledger,
    log: Log,
    _database: crate::support::Database,
}

/// The statements and rows that a database has read.
#[derive(Clone, Copy, Debug)]
struct Reads {
    statements: i64,
    rows: i64,
}

/// PostgreSQL's own counters of this database. A session adds its counts at its end.
async fn reads(pool: &PgPool) -> Reads {
    let others = "select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'";
    let mut session = pool.acquire().await.unwrap();
    sqlx::query(others).execute(&mut *session).await.unwrap();
    sqlx::query("select pg_stat_force_next_flush()").execute(&mut *session).await.unwrap();
    let rows = "select coalesce(sum(seq_tup_read), 0)::bigint + coalesce(sum(idx_tup_fetch), 0)::bigint
             + (select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes) from pg_stat_user_tables";
    let statements = "select xact_commit from pg_stat_database where datname = current_database()";
    Reads {
        rows: sqlx::query_scalar(rows).fetch_one(&mut *session).await.unwrap(),
        statements: sqlx::query_scalar(statements).fetch_one(&mut *session).await.unwrap(),
    }
}

impl Site {
    async fn new(builds: i32) -> Site {
        let coderd = Coderd::new(SchemaVersion::Sep2026).await;
        let (database, ledger) = ledger_at(Clock::system()).await;
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.unwrap();
        let now = coderd.now().await;
        ledger
            .run(async |conn| {
                ledger::sources::register(conn, coderd.deployment, now, None, now).await
            })
            .await
            .unwrap();
        let site = Site { coderd, ledger, log, _database: database };
        site.fill_coderd(builds, now).await;
        site.fill_ledger(builds, now).await;
        site
    }

    async fn fill_coderd(&self, builds: i32, now: DateTime<Utc>) {
        let pool = &self.coderd.database.pool;
        let workspace = self.coderd.workspace().await;
        let jobs = "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
                 storage_method, type, input, worker_id, file_id)
             select md5('job' || n)::uuid, at, at, at, at, $3, $4, 'terraform', 'file', 'workspace_build', '{}', md5((n % 20)::text)::uuid, $4
             from (select n, $2::timestamptz - n * (interval '100 days' / $1::integer) - interval '1 hour' as at from generate_series(1, $1::integer) n) jobs";
        sqlx::query(jobs)
            .bind(builds)
            .bind(now)
            .bind(self.coderd.organization)
            .bind(self.coderd.owner)
            .execute(pool)
            .await
            .unwrap();
        let rows = "insert into workspace_builds (id, created_at, updated_at, workspace_id, template_version_id, build_number, transition, initiator_id, job_id)
             select md5('build' || n)::uuid, now(), now(), $2, $3, n, 'stop', $4, md5('job' || n)::uuid from generate_series(1, $1::integer) n";
        sqlx::query(rows)
            .bind(builds)
            .bind(workspace)
            .bind(self.coderd.version)
            .bind(self.coderd.owner)
            .execute(pool)
            .await
            .unwrap();
        sqlx::raw_sql("alter table usage_events disable trigger all").execute(pool).await.unwrap();
        let usage = "insert into usage_events (id, event_type, event_data, created_at, published_at)
             select md5('usage' || n), 'dc_managed_agents_v1', '{\"count\": 1}', at, at
             from (select n, $2::timestamptz - n * (interval '1400 days' / $1::integer) - interval '1 hour' as at from generate_series(1, $1::integer / 2) n) rows";
        sqlx::query(usage).bind(builds).bind(now).execute(pool).await.unwrap();
        sqlx::raw_sql("vacuum analyze").execute(pool).await.unwrap();
    }

    /// The same rows, with the digests of `event/envelope.rs`.
    async fn fill_ledger(&self, builds: i32, now: DateTime<Utc>) {
        let workspace: uuid::Uuid = sqlx::query_scalar("select id from workspaces limit 1")
            .fetch_one(&self.coderd.database.pool)
            .await
            .unwrap();
        let build = "insert into workspace_build (source_id, build_id, batch_id, log_offset, digest, workspace_id, organization_id, template_id, template_version_id,
                 owner_id, initiator_id, transition, reason, status, build_number, first_build_by_prebuilds_user, first_successful_start, daily_cost,
                 created_at, started_at, completed_at, organization_name, template_name, template_version_name, preset_name, workspace_name, owner_name, confirmed_at)
             select 1, id, 1, n, sha256(int8send(19) || 'tallyline.digest.v1'::bytea || int8send(28) || 'workspace_build_completed_v1'::bytea
                     || uuid_send(id) || uuid_send($3::uuid) || uuid_send($4::uuid) || uuid_send($5::uuid) || uuid_send($6::uuid) || int8send(n)
                     || int8send(4) || 'stop'::bytea || '\\x00'::bytea || micros || '\\x01'::bytea || micros || micros || int8send(9) || 'succeeded'::bytea),
                 $3, $4, $7, $5, $6, $6, 'stop', 'initiator', 'succeeded', n, false, false, 0, at, at, at, 'acme', 'docker', 'v1', '', 'w', 'user-001', at
             from (select n, md5('build' || n)::uuid as id, at, int8send((extract(epoch from at) * 1000000)::bigint) as micros
                   from (select n, $2::timestamptz - n * (interval '100 days' / $1::integer) - interval '1 hour' as at from generate_series(1, $1::integer) n) times) rows";
        sqlx::query(build)
            .bind(builds)
            .bind(now)
            .bind(workspace)
            .bind(self.coderd.organization)
            .bind(self.coderd.version)
            .bind(self.coderd.owner)
            .bind(self.coderd.template)
            .execute(&self.ledger.pool)
            .await
            .unwrap();
        let usage = "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at, confirmed_at)
             select 1, id, 1, n, sha256(int8send(19) || 'tallyline.digest.v1'::bytea || int8send(20) || 'dc_managed_agents_v1'::bytea
                     || int8send(32) || id::bytea || int8send(1) || int8send((extract(epoch from at) * 1000000)::bigint)), 'dc_managed_agents_v1', 1, at, at
             from (select n, md5('usage' || n) as id, $2::timestamptz - n * (interval '1400 days' / $1::integer) - interval '1 hour' as at
                   from generate_series(1, $1::integer / 2) n) rows";
        sqlx::query(usage).bind(builds).bind(now).execute(&self.ledger.pool).await.unwrap();
        let swept = "update collector_progress set pass_id = 1, swept_pass_id = 1, reports = true, swept_at = $1, started_at = $1, complete_until = $1";
        sqlx::query(swept).bind(now).execute(&self.ledger.pool).await.unwrap();
        sqlx::raw_sql("vacuum analyze").execute(&self.ledger.pool).await.unwrap();
    }

    fn source(&self) -> coderd::Database {
        coderd::Database::new(&self.coderd.database.url, Duration::from_secs(30)).unwrap()
    }

    /// One pass of a collector.
    async fn pass(&self) {
        let settings =
            Settings { deployment_id: Some(self.coderd.deployment), ..Settings::new("test") };
        let mut collector = Collector::open(
            settings,
            self.source(),
            PublicKeys::new(),
            self.log.clone(),
            self.ledger.clone(),
            Clock::system(),
        )
        .await
        .unwrap()
        .unwrap();
        let report = collector.pass().await.unwrap();
        assert_eq!((report.full_sweep, report.builds, report.usage), (false, 0, 0));
        collector.close().await;
    }

    /// One round of the continuous audit.
    async fn round(&self) {
        let audit = Audit {
            ledger: self.ledger.clone(),
            log: self.log.clone(),
            source: Some((self.source(), self.coderd.deployment)),
            patience: Duration::from_secs(1),
        };
        let telemetry = AuditTelemetry::register(&prometheus::Registry::new(), true).unwrap();
        let (every, late_after) = (Duration::from_secs(3600), 1_000);
        let continuous = Continuous { audit, every, late_after, holder: "test".into(), telemetry };
        let stop = CancellationToken::new();
        let signal = stop.clone();
        let running = tokio::spawn(async move { continuous.run(&signal).await });
        eventually(Duration::from_secs(120), "a finding", async || {
            let found = self.ledger.run(findings::list).await.unwrap();
            found.iter().any(|finding| finding.joint == SOURCE && finding.differences == 0)
        })
        .await;
        stop.cancel();
        running.await.unwrap();
    }

    /// The cost of a pass and of a round for coderd's database.
    async fn cost(&self) -> [Reads; 2] {
        let pool = &self.coderd.database.pool;
        let begun = reads(pool).await;
        self.pass().await;
        let passed = reads(pool).await;
        self.round().await;
        let audited = reads(pool).await;
        let between = |from: Reads, to: Reads| Reads {
            statements: to.statements - from.statements,
            rows: to.rows - from.rows,
        };
        [between(begun, passed), between(passed, audited)]
    }
}

#[tokio::test]
async fn a_pass_and_a_round_of_the_audit_cost_coderd_the_same_with_ten_times_the_history() {
    let small = Site::new(20_000).await.cost().await;
    let large = Site::new(200_000).await.cost().await;
    for (small, large) in small.into_iter().zip(large) {
        assert!(large.statements <= small.statements + 5, "{small:?} {large:?}");
        // Ten times as many rows come in an hour: the last hour and the compared days have more.
        assert!(large.rows <= small.rows + 30_000, "{small:?} {large:?}");
    }
}
