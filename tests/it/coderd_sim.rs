//! The simulated coderd: in both schemas, its rows and its truth give the same numbers by coderd's
//! own predicates.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgPool;
use tallyline::clock::Clock;
use tallyline_sim::coderd::truth::{Status, Transition, UsageKind};
use tallyline_sim::coderd::{Config, Options, SchemaVersion, Simulation, Truth, live};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::oracle::{self, UsageState};
use crate::support::{self, eventually};

fn history(seed: u64, schema: SchemaVersion, days: i64, builds: usize) -> Config {
    let end = Clock::system().now() - TimeDelta::minutes(1);
    Config::history(seed, schema, end - TimeDelta::days(days), end, builds)
}

#[tokio::test]
async fn both_oracles_agree_in_the_tasks_era() {
    both_oracles_agree(SchemaVersion::TasksEra).await;
}

#[tokio::test]
async fn both_oracles_agree_in_the_schema_without_tasks() {
    both_oracles_agree(SchemaVersion::Sep2026).await;
}

/// Also after renames, removed presets, and a template that takes another one's old name.
async fn both_oracles_agree(schema: SchemaVersion) {
    let database = support::database().await;
    let config = Config {
        coderd_publishes_until: Some(Clock::system().now() - TimeDelta::days(10)),
        ..history(7, schema, 40, 5000)
    };
    let mut simulation = Simulation::start(config.clone(), &database.url).await.unwrap();
    simulation.advance_to(config.start + (config.end - config.start) / 3).await.unwrap();
    simulation.commit_held().await.unwrap();
    agree(&database.pool, &simulation.truth()).await;
    simulation.finish().await.unwrap();
    agree(&database.pool, &simulation.truth()).await;
    assert!(simulation.completed_builds() >= 5000);

    let renames = simulation.rename_things(config.end).await.unwrap();
    assert_eq!(renames.len(), 6, "{renames:?}");
    simulation.extend(config.end + TimeDelta::minutes(2), 300);
    simulation.finish().await.unwrap();
    let truth = simulation.truth();
    agree(&database.pool, &truth).await;
    assert!(truth.builds.iter().any(|build| build.completed_at > config.end
        && build.labels.template_name.ends_with("-renamed-0")));
}

/// Checks that both oracles have the same numbers.
async fn agree(coderd: &PgPool, truth: &Truth) {
    let names = truth.names();
    assert_eq!(rows(coderd).await, truth_rows(truth));
    assert_eq!(oracle::creation_totals(coderd, &names).await, truth.creation_totals());
    let middle = truth.builds[truth.builds.len() / 2].completed_at;
    for introduced in [DateTime::UNIX_EPOCH, middle, middle + TimeDelta::microseconds(1)] {
        assert_eq!(
            oracle::creation_micros(coderd, &names, introduced).await,
            truth.creation_micros(introduced)
        );
        assert_eq!(
            oracle::claim_micros(coderd, &names, introduced).await,
            truth.claim_micros(introduced)
        );
    }
    assert_eq!(oracle::clock_skews(coderd).await as u64, truth.clock_skews);
    assert_eq!(oracle::active_seats(coderd).await as u64, truth.active_seats);
    usage_agrees(coderd, truth).await;
    licenses_agree(coderd, truth).await;
}

async fn usage_agrees(coderd: &PgPool, truth: &Truth) {
    let stored: BTreeMap<String, (String, serde_json::Value, DateTime<Utc>)> =
        sqlx::query_as::<_, (String, String, serde_json::Value, DateTime<Utc>)>(
            "select id, event_type, event_data, created_at from usage_events",
        )
        .fetch_all(coderd)
        .await
        .unwrap()
        .into_iter()
        .map(|(id, kind, data, at)| (id, (kind, data, at)))
        .collect();
    assert_eq!(stored.len(), truth.usage.len());
    for row in &truth.usage {
        let data = serde_json::from_str(&row.event_type.data(row.quantity)).unwrap();
        assert_eq!(stored[&row.id], (row.event_type.event_type().to_owned(), data, row.created_at));
    }
    let now = Clock::system().now();
    let states: BTreeMap<String, UsageState> = truth
        .usage
        .iter()
        .map(|row| {
            let state = match (row.published_at.is_some(), row.failure_message.is_some()) {
                (true, false) => UsageState::Accepted,
                (true, true) => UsageState::Refused,
                (false, true) => UsageState::PendingAfterFailure,
                (false, false) => UsageState::Pending,
            };
            (row.id.clone(), state)
        })
        .collect();
    assert_eq!(oracle::usage_states(coderd, now).await, states);
    let gauges = oracle::publisher_gauges(coderd, now).await;
    let unpublished =
        || truth.usage.iter().filter(|row| row.published_at.is_none()).map(|row| row.created_at);
    let line = now - TimeDelta::days(30);
    assert_eq!(gauges.pending as usize, unpublished().filter(|at| *at > line).count());
    assert_eq!(gauges.oldest, unpublished().filter(|at| *at > line).min());
    assert_eq!(
        gauges.expired as usize,
        unpublished().filter(|at| *at <= line && *at > now - TimeDelta::days(60)).count()
    );
}

/// The rollup by coderd's whole days, and the exact count of each window.
async fn licenses_agree(coderd: &PgPool, truth: &Truth) {
    let stored: Vec<(String, DateTime<Utc>, Uuid)> =
        sqlx::query_as("select jwt, exp, uuid from licenses order by uploaded_at, id")
            .fetch_all(coderd)
            .await
            .unwrap();
    let truth_rows: Vec<_> = truth
        .licenses
        .iter()
        .map(|license| (license.jwt.clone(), license.claims.exp, license.uuid))
        .collect();
    assert_eq!(stored.len(), truth_rows.len());
    assert!(truth_rows.iter().all(|license| stored.contains(license)));
    for license in &truth.licenses {
        let (start, end) = (license.claims.nbf, license.claims.exp);
        let agents = || truth.usage.iter().filter(|row| row.event_type == UsageKind::ManagedAgents);
        let whole_days: i64 = agents()
            .filter(|row| {
                row.created_at.date_naive() >= start.date_naive()
                    && row.created_at.date_naive() <= end.date_naive()
            })
            .map(|row| row.quantity)
            .sum();
        assert_eq!(oracle::managed_agents_in_whole_days(coderd, start, end).await, whole_days);
        assert_eq!(license.managed_agents, truth.managed_agents(start, end));
        let runtime: i64 = truth
            .usage
            .iter()
            .filter(|row| {
                row.event_type == UsageKind::Runtime
                    && row.created_at >= start
                    && row.created_at < end
            })
            .map(|row| row.quantity)
            .sum();
        assert_eq!(oracle::agent_runtime_ms(coderd, start, end).await, runtime);
    }
}

/// By build id: number, transition, status, queued, started and completed.
type Rows =
    BTreeMap<Uuid, (i32, String, String, DateTime<Utc>, Option<DateTime<Utc>>, DateTime<Utc>)>;

/// The completed builds in coderd's tables.
async fn rows(coderd: &PgPool) -> Rows {
    sqlx::query_as::<_, (Uuid, i32, String, String, DateTime<Utc>, Option<DateTime<Utc>>, DateTime<Utc>)>(
        "select build.id, build_number, transition::text, job_status::text, job.created_at, started_at, completed_at
         from workspace_builds build join provisioner_jobs job on job.id = build.job_id
         where job.type = 'workspace_build' and completed_at is not null",
    )
    .fetch_all(coderd)
    .await
    .unwrap()
    .into_iter()
    .map(|(id, number, transition, status, created, started, completed)| (id, (number, transition, status, created, started, completed)))
    .collect()
}

/// The completed builds in the simulator's truth.
fn truth_rows(truth: &Truth) -> Rows {
    let row = |build: &tallyline_sim::coderd::truth::BuildTruth| {
        let transition = match build.transition {
            Transition::Start => "start",
            Transition::Stop => "stop",
            Transition::Delete => "delete",
        };
        let status = match build.status {
            Status::Succeeded => "succeeded",
            Status::Failed => "failed",
            Status::Canceled => "canceled",
        };
        (
            build.id,
            (
                build.build_number,
                transition.to_owned(),
                status.to_owned(),
                build.created_at,
                build.started_at,
                build.completed_at,
            ),
        )
    };
    truth.builds.iter().map(row).collect()
}

#[tokio::test]
async fn rows_end_the_same_in_coderds_own_transactions_and_in_large_ones() {
    let mut dumps = Vec::new();
    let config = history(3, SchemaVersion::TasksEra, 10, 150);
    for acts_per_transaction in [1, 500] {
        let database = support::database().await;
        let mut simulation =
            Simulation::start(Config { acts_per_transaction, ..config.clone() }, &database.url)
                .await
                .unwrap();
        simulation.finish().await.unwrap();
        let dump: Vec<(String,)> = sqlx::query_as(
            "select row::text from (select * from provisioner_jobs where type = 'workspace_build') row
             union all select row::text from workspace_builds row union all select row::text from workspaces row
             union all select row::text from tasks row union all select row::text from usage_events row
             union all select row::text from usage_events_daily row union all select row::text from templates row order by 1",
        )
        .fetch_all(&database.pool)
        .await
        .unwrap();
        dumps.push(dump);
    }
    assert!(dumps[0].len() > 500);
    assert_eq!(dumps[0], dumps[1]);
}

#[tokio::test]
async fn a_late_commit_is_invisible_while_later_completions_are_there() {
    let database = support::database().await;
    let config = Config {
        late_commit_every: 10,
        heartbeats: false,
        ..history(5, SchemaVersion::Sep2026, 5, 2000)
    };
    let mut simulation = Simulation::start(config.clone(), &database.url).await.unwrap();
    let mut now = config.start;
    let mut overtaken = 0;
    while now < config.end && overtaken < 3 {
        now += TimeDelta::seconds(20);
        simulation.advance_to(now).await.unwrap();
        if simulation.held() == 0 {
            continue;
        }
        let visible = rows(&database.pool).await;
        let truth = truth_rows(&simulation.truth());
        let hidden: Vec<_> = truth
            .iter()
            .filter(|(id, _)| !visible.contains_key(*id))
            .map(|(_, row)| row.5)
            .collect();
        assert_eq!(hidden.len(), simulation.held());
        overtaken += usize::from(visible.values().any(|row| hidden.iter().any(|at| row.5 > *at)));
        if overtaken == 3 {
            simulation.commit_held().await.unwrap();
            assert_eq!(rows(&database.pool).await, truth);
        }
    }
    assert_eq!(overtaken, 3);
}

#[tokio::test]
async fn in_real_time_builds_complete_now_and_both_oracles_agree() {
    let database = support::database().await;
    let clock = Clock::system();
    let mut simulation =
        Simulation::start(history(9, SchemaVersion::TasksEra, 2, 50), &database.url).await.unwrap();
    simulation.finish().await.unwrap();
    let (before, begun) = (simulation.completed_builds(), clock.now());
    let stop = CancellationToken::new();
    let watching = async {
        eventually(Duration::from_secs(30), "builds complete in real time", || async {
            let done: i64 = sqlx::query_scalar(
                "select count(*) from provisioner_jobs where completed_at >= $1",
            )
            .bind(begun)
            .fetch_one(&database.pool)
            .await
            .unwrap();
            done >= 20
        })
        .await;
        stop.cancel();
    };
    let (acted, ()) = tokio::join!(live(&mut simulation, 20.0, &clock, &stop, |_| {}), watching);
    acted.unwrap();
    let truth = simulation.truth();
    assert!(truth.builds.len() >= before + 20);
    assert!(truth.builds.last().unwrap().completed_at <= clock.now());
    agree(&database.pool, &truth).await;
}

#[tokio::test]
async fn the_command_writes_the_truth_and_the_key_that_verifies_the_licenses() {
    let database = support::database().await;
    let folder = tempfile::tempdir().unwrap();
    let (truth_file, key_file) =
        (folder.path().join("truth.json"), folder.path().join("license.pem"));
    let options = Options {
        database_url: database.url.clone(),
        seed: 4,
        builds: 60,
        days: 3,
        schema: SchemaVersion::TasksEra,
        real_time: true,
        rate: 5.0,
        run_for: Some(Duration::from_secs(1)),
        without_heartbeats: false,
        truth: Some(truth_file.clone()),
        license_key_out: Some(key_file.clone()),
    };
    let truth = tallyline_sim::coderd::run(options, Clock::system(), CancellationToken::new())
        .await
        .unwrap();
    assert_eq!(Truth::read(&truth_file).unwrap(), truth);
    assert_eq!(std::fs::read_to_string(&key_file).unwrap(), truth.license_key.public_key_pem);
    agree(&database.pool, &truth).await;
}

#[tokio::test]
async fn later_changes_change_the_rows_and_not_the_truth() {
    let database = support::database().await;
    let config = history(6, SchemaVersion::TasksEra, 3, 300);
    let mut simulation = Simulation::start(config.clone(), &database.url).await.unwrap();
    simulation.finish().await.unwrap();
    let before = truth_rows(&simulation.truth());
    let acquired = simulation
        .acquire_a_canceled_job(config.end)
        .await
        .unwrap()
        .expect("a job was canceled while pending");
    let removed = simulation.remove_a_build().await.unwrap().expect("a build completed");
    assert_eq!(truth_rows(&simulation.truth()), before);
    let after = rows(&database.pool).await;
    assert_eq!((before[&acquired].4, after[&acquired].4), (None, Some(config.end)));
    assert!(before.contains_key(&removed) && !after.contains_key(&removed));
    assert_eq!(after.len(), before.len() - 1);

    let mut claims = simulation.truth().licenses[0].claims.clone();
    claims.jti = Uuid::from_u128(5).to_string();
    simulation.upload_license(claims, config.end).await.unwrap();
    licenses_agree(&database.pool, &simulation.truth()).await;
}

#[tokio::test]
async fn the_catalog_distinguishes_the_eras() {
    let probes = "select
        exists (select from information_schema.columns where table_name = 'workspace_builds' and column_name = 'has_ai_task') as ai_flag,
        to_regclass('tasks') is not null as tasks,
        exists (select from pg_enum where enumlabel = 'task_resume') as task_reasons,
        exists (select from pg_index where indexrelid = 'idx_usage_events_agent_runtime'::regclass and indisunique) as unique_hours,
        exists (select from pg_constraint where conname = 'usage_events_agent_runtime_hour_aligned') as whole_hours,
        exists (select from information_schema.columns where table_name = 'replicas' and column_name = 'nats_port') as nats";
    for (schema, expected) in [
        (SchemaVersion::TasksEra, (true, true, true, false, false, false)),
        (SchemaVersion::Sep2026, (false, false, false, true, true, true)),
    ] {
        let database = support::database().await;
        tallyline_sim::coderd::create_schema(&mut database.pool.acquire().await.unwrap(), schema)
            .await
            .unwrap();
        let actual: (bool, bool, bool, bool, bool, bool) =
            sqlx::query_as(probes).fetch_one(&database.pool).await.unwrap();
        assert_eq!(actual, expected, "{schema:?}");

        let usage = |id: &'static str, kind: &'static str, at: &'static str| {
            sqlx::query("insert into usage_events (id, event_type, event_data, created_at) values ($1, $2, '{}', $3::text::timestamptz)")
                .bind(id)
                .bind(kind)
                .bind(at)
                .execute(&database.pool)
        };
        assert!(usage("a", "hb_agent_runtime_v1", "2026-09-21T10:00:00Z").await.is_ok());
        assert_eq!(
            usage("b", "hb_agent_runtime_v1", "2026-09-21T10:00:00Z").await.is_ok(),
            schema == SchemaVersion::TasksEra
        );
        assert_eq!(
            usage("c", "hb_agent_runtime_v1", "2026-09-21T10:30:00Z").await.is_ok(),
            schema == SchemaVersion::TasksEra
        );
        assert!(usage("d", "dc_managed_agents_v2", "2026-09-21T10:30:00Z").await.is_err());
    }
}

#[tokio::test]
async fn jobs_have_coderds_indexes_and_no_other() {
    let database = support::database().await;
    tallyline_sim::coderd::create_schema(
        &mut database.pool.acquire().await.unwrap(),
        SchemaVersion::Sep2026,
    )
    .await
    .unwrap();
    let indexes: Vec<String> = sqlx::query_scalar(
        "select replace(indexdef, 'public.', '') from pg_indexes where tablename in ('provisioner_jobs', 'workspace_builds') order by indexname",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    let expected = [
        "CREATE INDEX idx_provisioner_jobs_status ON provisioner_jobs USING btree (job_status)",
        "CREATE INDEX idx_workspace_builds_initiator_id ON workspace_builds USING btree (initiator_id)",
        "CREATE UNIQUE INDEX provisioner_jobs_pkey ON provisioner_jobs USING btree (id)",
        "CREATE INDEX provisioner_jobs_started_at_idx ON provisioner_jobs USING btree (started_at) WHERE (started_at IS NULL)",
        "CREATE INDEX provisioner_jobs_worker_id_organization_id_completed_at_idx ON provisioner_jobs USING btree (worker_id, organization_id, completed_at DESC)",
        "CREATE UNIQUE INDEX workspace_builds_id_workspace_id_key ON workspace_builds USING btree (id, workspace_id)",
        "CREATE UNIQUE INDEX workspace_builds_job_id_key ON workspace_builds USING btree (job_id)",
        "CREATE UNIQUE INDEX workspace_builds_pkey ON workspace_builds USING btree (id)",
        "CREATE UNIQUE INDEX workspace_builds_workspace_id_build_number_key ON workspace_builds USING btree (workspace_id, build_number)",
    ];
    assert_eq!(indexes, expected);
}

#[tokio::test]
async fn a_jobs_status_follows_from_its_times_and_its_error() {
    let database = support::database().await;
    let mut connection = database.pool.acquire().await.unwrap();
    tallyline_sim::coderd::create_schema(&mut connection, SchemaVersion::Sep2026).await.unwrap();
    sqlx::raw_sql(
        "insert into organizations (id, name, description, created_at, updated_at, display_name, default_org_member_roles)
         values ('00000000-0000-0000-0000-000000000001', 'o', '', now(), now(), '', '{}')",
    )
    .execute(&mut *connection)
    .await
    .unwrap();
    // Completed, canceled, started, error -> status. An empty error is absent; a real one takes
    // precedence over a cancel and needs no end.
    let cases = [
        (true, false, true, None, "succeeded"),
        (true, false, true, Some(""), "succeeded"),
        (true, true, false, None, "canceled"),
        (true, true, true, Some(""), "canceled"),
        (true, true, true, Some("no"), "failed"),
        (false, false, true, Some("no"), "failed"),
        (false, true, true, None, "canceling"),
        (false, false, false, Some(""), "pending"),
        (false, false, true, None, "running"),
    ];
    for (completed, canceled, started, error, expected) in cases {
        let status: String = sqlx::query_scalar(
            "insert into provisioner_jobs (id, created_at, updated_at, organization_id, initiator_id, provisioner, storage_method, type, input,
                 file_id, completed_at, canceled_at, started_at, error)
             values (gen_random_uuid(), now(), now(), '00000000-0000-0000-0000-000000000001', gen_random_uuid(), 'terraform', 'file',
                 'workspace_build', '{}', gen_random_uuid(), case when $1 then now() end, case when $2 then now() end,
                 case when $3 then now() end, $4)
             returning job_status::text",
        )
        .bind(completed)
        .bind(canceled)
        .bind(started)
        .bind(error)
        .fetch_one(&mut *connection)
        .await
        .unwrap();
        assert_eq!(status, expected, "{completed} {canceled} {started} {error:?}");
    }
}

#[tokio::test]
async fn a_database_that_is_in_use_is_refused() {
    let database = support::database().await;
    let config = history(1, SchemaVersion::Sep2026, 1, 5);
    Simulation::start(config.clone(), &database.url).await.unwrap();
    let refused = Simulation::start(config, &database.url).await.err().unwrap();
    assert!(refused.to_string().contains("already has coderd's tables"), "{refused}");
}
