//! The cost of a round of the audit, of a collector's pass and of the status does not grow with the
//! history, in coderd's database and in the ledger.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::collectors::{Collector, Settings};
use tallyline::ledger::{Ledger, findings};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::{coderd, ledger, status};
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
    database: crate::support::Database,
}

/// The statements and rows that a database has read.
#[derive(Clone, Copy, Debug)]
struct Reads {
    statements: i64,
    rows: i64,
}

/// PostgreSQL's own counters of this database: transactions, and rows of tables and indexes. A
/// session adds its counts at its end.
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
        let site = Site { coderd, ledger, log, database };
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

    /// The log's batches of 500 events, `events` of this topic.
    async fn fill_batches(&self, topic: &str, events: i32) {
        let pool = &self.database.pool;
        sqlx::raw_sql("alter table batch disable trigger batch_takes_sequence")
            .execute(pool)
            .await
            .unwrap();
        let batches = "insert into batch (sequence, kind, recorded_at, topic, partition, generation, first_offset, next_offset, records, accepted)
             select (select next_sequence from ledger) + n, 'log', now() - interval '1 hour', $1, 0, 1, n * 500, n * 500 + 500, 500, 500
             from generate_series(0, $2 / 500 - 1) n";
        sqlx::query(batches).bind(topic).bind(events).execute(pool).await.unwrap();
        sqlx::raw_sql(
            "update ledger set next_sequence = (select max(sequence) + 1 from batch);
             alter table batch enable trigger batch_takes_sequence",
        )
        .execute(pool)
        .await
        .unwrap();
    }

    /// The same rows, with the digests of `event/envelope.rs`.
    async fn fill_ledger(&self, builds: i32, now: DateTime<Utc>) {
        let workspace: uuid::Uuid = sqlx::query_scalar("select id from workspaces limit 1")
            .fetch_one(&self.coderd.database.pool)
            .await
            .unwrap();
        self.fill_batches("tallyline.workspace-builds.v1", builds).await;
        self.fill_batches("tallyline.agent-usage.v1", builds / 2).await;
        let build = "insert into workspace_build (source_id, build_id, batch_id, log_offset, digest, workspace_id, organization_id, template_id, template_version_id,
                 owner_id, initiator_id, transition, reason, status, build_number, first_build_by_prebuilds_user, first_successful_start, daily_cost,
                 created_at, started_at, completed_at, organization_name, template_name, template_version_name, preset_name, workspace_name, owner_name, confirmed_at)
             select 1, rows.id, batch.id, n - 1, sha256(int8send(19) || 'tallyline.digest.v1'::bytea || int8send(28) || 'workspace_build_completed_v1'::bytea
                     || uuid_send(rows.id) || uuid_send($3::uuid) || uuid_send($4::uuid) || uuid_send($5::uuid) || uuid_send($6::uuid) || int8send(n)
                     || int8send(4) || 'stop'::bytea || '\\x00'::bytea || micros || '\\x01'::bytea || micros || micros || int8send(9) || 'succeeded'::bytea),
                 $3, $4, $7, $5, $6, $6, 'stop', 'initiator', 'succeeded', n, false, false, 0, at, at, at, 'acme', 'docker', 'v1', '', 'w', 'user-001', at
             from (select n, md5('build' || n)::uuid as id, at, int8send((extract(epoch from at) * 1000000)::bigint) as micros
                   from (select n, $2::timestamptz - n * (interval '100 days' / $1::integer) - interval '1 hour' as at from generate_series(1, $1::integer) n) times) rows
             join batch on topic = 'tallyline.workspace-builds.v1' and first_offset = (n - 1) / 500 * 500";
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
             select 1, rows.id, batch.id, n - 1, sha256(int8send(19) || 'tallyline.digest.v1'::bytea || int8send(20) || 'dc_managed_agents_v1'::bytea
                     || int8send(32) || rows.id::bytea || int8send(1) || int8send((extract(epoch from at) * 1000000)::bigint)), 'dc_managed_agents_v1', 1, at, at
             from (select n, md5('usage' || n) as id, $2::timestamptz - n * (interval '1400 days' / $1::integer) - interval '1 hour' as at
                   from generate_series(1, $1::integer / 2) n) rows
             join batch on topic = 'tallyline.agent-usage.v1' and first_offset = (n - 1) / 500 * 500";
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
        let (every, late_after) = (Duration::from_secs(300), 12_000);
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

    /// The cost of this work for coderd's database and for the ledger.
    async fn cost_of(&self, work: impl AsyncFnOnce()) -> [Reads; 2] {
        let pools = [&self.coderd.database.pool, &self.database.pool];
        let begun = [reads(pools[0]).await, reads(pools[1]).await];
        work().await;
        let ended = [reads(pools[0]).await, reads(pools[1]).await];
        [0, 1].map(|at| Reads {
            statements: ended[at].statements - begun[at].statements,
            rows: ended[at].rows - begun[at].rows,
        })
    }

    /// The cost of a pass, of a round and of a status.
    async fn costs(&self) -> [(&'static str, [Reads; 2]); 3] {
        let status = async || {
            drop(status::read(&self.ledger, &self.log, Duration::from_secs(30)).await.unwrap());
        };
        [
            ("pass", self.cost_of(async || self.pass().await).await),
            ("round", self.cost_of(async || self.round().await).await),
            ("status", self.cost_of(status).await),
        ]
    }
}

#[tokio::test]
async fn a_pass_a_round_and_a_status_cost_the_same_with_ten_times_the_history() {
    let small = Site::new(20_000).await.costs().await;
    let large = Site::new(200_000).await.costs().await;
    for ((what, small), (_, large)) in small.into_iter().zip(large) {
        for (database, small, large) in
            [("coderd", small[0], large[0]), ("ledger", small[1], large[1])]
        {
            // the ledger's also counts this test's own waiting
            let more = if database == "coderd" { 5 } else { 100 };
            let costs = format!("{what}, {database}: {small:?} {large:?}");
            println!("{costs}");
            assert!(large.statements <= small.statements + more, "{costs}");
            // Ten times as many rows come in an hour: the last hour and the compared days have more.
            // A status counts at most 8 MiB of each table, and the small tables are smaller.
            let more = if what == "status" { 60_000 } else { 30_000 };
            assert!(large.rows <= small.rows + more, "{costs}");
        }
    }
}
