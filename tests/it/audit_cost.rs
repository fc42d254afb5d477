//! The rows that the continuous audit and the status read do not grow with history.

use std::time::Duration;

use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::ledger::{Ledger, LedgerSettings, findings};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::status;
use tokio_util::sync::CancellationToken;

use crate::support::ledger::migrated;
use crate::support::{Database, eventually};

const SECONDS: Duration = Duration::from_secs(60);

/// A ledger with builds in batches of 500.
struct Filled {
    database: Database,
    /// One connection, so that its server process counts everything.
    ledger: Ledger,
    log: Log,
}

impl Filled {
    async fn with(builds: i32) -> Filled {
        let database = migrated().await;
        sqlx::raw_sql(
            "alter table batch disable trigger batch_takes_sequence;
             insert into batch (sequence, kind, recorded_at) values (1, 'source', now());
             insert into source (deployment_id, batch_id, introduced_at) values (gen_random_uuid(), 1, now())",
        )
        .execute(&database.pool)
        .await
        .unwrap();
        sqlx::query(
            "insert into batch (sequence, kind, recorded_at, topic, partition, generation, first_offset, next_offset, records, accepted)
             select n + 2, 'log', now() - make_interval(hours => 1), 'tallyline.workspace-builds.v1', 0, 1, n * 500, n * 500 + 500, 500, 500
             from generate_series(0, $1 / 500 - 1) n",
        )
        .bind(builds)
        .execute(&database.pool)
        .await
        .unwrap();
        sqlx::query(
            "insert into workspace_build (source_id, build_id, batch_id, log_offset, digest, workspace_id, organization_id, template_id,
                 template_version_id, owner_id, initiator_id, transition, reason, status, build_number, first_build_by_prebuilds_user,
                 first_successful_start, daily_cost, created_at, completed_at, organization_name, template_name, template_version_name,
                 preset_name, workspace_name, owner_name)
             select 1, gen_random_uuid(), n / 500 + 2, n, '', gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(),
                 gen_random_uuid(), gen_random_uuid(), 'start', 'initiator', 'succeeded', 1, false, false, 0, now(), now(), 'o', 't', 'v', '', 'w', 'u'
             from generate_series(0, $1 - 1) n",
        )
        .bind(builds)
        .execute(&database.pool)
        .await
        .unwrap();
        sqlx::raw_sql(
            "update ledger set next_sequence = (select max(sequence) + 1 from batch);
             alter table batch enable trigger batch_takes_sequence",
        )
        .execute(&database.pool)
        .await
        .unwrap();
        sqlx::raw_sql("vacuum analyze").execute(&database.pool).await.unwrap();
        let settings = LedgerSettings { url: database.url.clone(), connections: 1 };
        let ledger = Ledger::open(&settings, Clock::system()).unwrap();
        let log = Log::postgres(database.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.unwrap();
        Filled { database, ledger, log }
    }

    /// The rows that `work` reads, in tables and in indexes.
    async fn rows_read(&self, work: impl AsyncFnOnce()) -> i64 {
        let before = self.counted().await;
        work().await;
        self.counted().await - before
    }

    /// All rows that the ledger's connection has read.
    async fn counted(&self) -> i64 {
        // a server process reports its counts when a transaction ends
        sqlx::query("select pg_stat_force_next_flush()").execute(&self.ledger.pool).await.unwrap();
        sqlx::query("select 1").execute(&self.ledger.pool).await.unwrap();
        sqlx::query_scalar(
            "select (select sum(seq_tup_read) from pg_stat_user_tables)::bigint + (select sum(idx_tup_read) from pg_stat_user_indexes)::bigint",
        )
        .fetch_one(&self.database.pool)
        .await
        .unwrap()
    }

    /// One round of the audit: until each joint has read the newest batch.
    async fn round(&self) {
        sqlx::query("update audit_finding set audited_at = audited_at - interval '1 day'")
            .execute(&self.database.pool)
            .await
            .unwrap();
        let audit = Audit {
            ledger: self.ledger.clone(),
            log: self.log.clone(),
            source: None,
            patience: Duration::ZERO,
        };
        let telemetry = AuditTelemetry::register(&prometheus::Registry::new(), false).unwrap();
        let (every, late_after) = (Duration::from_secs(3600), 3);
        let continuous = Continuous { audit, every, late_after, holder: "test".into(), telemetry };
        let stop = CancellationToken::new();
        let ended = async {
            eventually(SECONDS, "a round", || async {
                let findings = sqlx::query_scalar(
                    "select count(*) = 2 and bool_and(audited_at > clock_timestamp() - interval '1 hour' and good_until is not null)
                         and not exists (select from lease where name = 'audit' and holder <> '') from audit_finding",
                );
                findings.fetch_one(&self.database.pool).await.unwrap()
            })
            .await;
            stop.cancel();
        };
        tokio::join!(continuous.run(&stop), ended);
        let found = self.ledger.run(findings::list).await.unwrap();
        assert!(found.iter().all(|finding| finding.differences == 0), "{found:?}");
    }

    async fn turns_have_ended(&self) -> bool {
        let found = self.ledger.run(findings::list).await.unwrap();
        found.iter().all(|finding| finding.whole_turn_ended_at.is_some())
    }
}

#[tokio::test]
async fn a_round_of_the_audit_and_a_status_read_as_much_after_200_000_builds_as_after_20_000() {
    let (small, large) = (Filled::with(20_000).await, Filled::with(200_000).await);
    let mut rests = Vec::new();
    let mut statuses = Vec::new();
    for site in [&small, &large] {
        site.round().await;
        let mut most = 0;
        while !site.turns_have_ended().await {
            most = site.rows_read(async || site.round().await).await.max(most);
        }
        // two joints read two pages each: the batches' events are counted, and compared
        assert!(most < 2 * 2 * 50_000 * 3, "{most}");
        rests.push(site.rows_read(async || site.round().await).await);
        statuses.push(
            site.rows_read(async || {
                drop(status::read(&site.ledger, &site.log, SECONDS).await.unwrap())
            })
            .await,
        );
    }
    assert!((rests[0] - rests[1]).abs() < 1_000, "{rests:?}");
    assert!((statuses[0] - statuses[1]).abs() < 20_000, "{statuses:?}");
}
