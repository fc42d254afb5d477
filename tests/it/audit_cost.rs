//! The rows that the continuous audit and the status read do not grow with history.

use std::time::Duration;

use chrono::TimeDelta;
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::ledger::{Ledger, LedgerSettings, TurnRows, findings};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::status;
use tempfile::NamedTempFile;
use tokio_util::sync::CancellationToken;

use crate::support::ledger::migrated;
use crate::support::process::run_tallyline;
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
        self.round_of(Duration::from_secs(3600)).await;
    }

    /// The same, of an audit with this interval.
    async fn round_of(&self, every: Duration) {
        for earlier in [
            "update audit_finding set audited_at = audited_at - interval '1 day'",
            "update audit_progress set stepped_at = stepped_at - interval '1 day'",
        ] {
            sqlx::query(earlier).execute(&self.database.pool).await.unwrap();
        }
        let audit = Audit {
            ledger: self.ledger.clone(),
            log: self.log.clone(),
            source: None,
            patience: Duration::ZERO,
        };
        let telemetry = AuditTelemetry::register(&prometheus::Registry::new(), false).unwrap();
        let late_after = 3;
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

    /// The turns that the status shows as overdue.
    async fn overdue(&self) -> Vec<TurnRows> {
        let status = status::read(&self.ledger, &self.log, SECONDS).await.unwrap();
        status.overdue_turns.iter().map(|turn| turn.rows).collect()
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

#[tokio::test]
async fn a_turn_with_more_pages_than_steps_ends_in_its_time() {
    let mut site = Filled::with(200_000).await;
    let begun = Clock::system().now();
    let clock = Clock::manual(begun);
    site.ledger.clock = clock.clone();
    // two steps a day, and four pages of batches
    let every = TimeDelta::hours(12);
    for _ in 0..2 {
        site.round_of(every.to_std().unwrap()).await;
        clock.set(clock.now() + every);
    }
    let found = site.ledger.run(findings::list).await.unwrap();
    for finding in &found {
        let ended_at = finding.recent_turn_ended_at.expect("it has ended");
        assert!(ended_at - begun <= TimeDelta::hours(24), "{finding:?}");
        assert_eq!(finding.recent_turn_due_at, None);
    }
    assert_eq!(found.len(), 2);
}

#[tokio::test]
async fn the_end_of_a_turn_does_not_move_with_new_batches() {
    let site = Filled::with(200_000).await;
    site.round().await;
    let ends = async || -> Vec<(i64, i64)> {
        let query = "select (progress->'recent'->'until'->>'sequence')::bigint, (progress->'audited'->>'sequence')::bigint from audit_progress";
        sqlx::query_as(query).fetch_all(&site.database.pool).await.unwrap()
    };
    assert_eq!(ends().await, [(401, 401); 2], "the turns have begun");
    sqlx::query("insert into batch (kind, recorded_at) values ('operator', now())")
        .execute(&site.database.pool)
        .await
        .unwrap();
    site.round().await;
    assert_eq!(ends().await, [(401, 402); 2]);
}

#[tokio::test]
async fn a_turn_that_has_not_ended_in_its_time_is_shown_as_overdue() {
    let mut site = Filled::with(200_000).await;
    let now = Clock::system().now();
    let clock = Clock::manual(now - TimeDelta::days(2));
    site.ledger.clock = clock.clone();
    site.round().await;
    assert_eq!(site.overdue().await, []);
    clock.set(now);
    assert_eq!(site.overdue().await, [TurnRows::Recent; 2], "of log and vendor");
    let pipeline = NamedTempFile::new().unwrap();
    let text = format!("roles = ['serve']\nledger.url = '{}'\n", site.database.url);
    std::fs::write(pipeline.path(), text).unwrap();
    let path = pipeline.path().to_str().unwrap();
    let shown = run_tallyline(&["status", "--pipeline", path], &[]).await;
    assert!(shown.stdout.contains("TURNS ARE OVERDUE"), "{}", shown.stdout);
    // the next step reads what is due
    site.round().await;
    assert_eq!(site.overdue().await, []);
}
