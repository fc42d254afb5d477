//! The simulated coderd, filled by SQL: a million jobs take seconds.

use std::time::{Duration, Instant};

use anyhow::Result;
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::{Connection as _, PgConnection};
use tallyline::clock::Clock;
use tallyline_sim::coderd::{Config, PREBUILDS_USER, SchemaVersion, Simulation};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::servers::{Database, Servers};

/// Builds of one workspace. Ranges of builds begin at a multiple of it.
const BUILDS_OF_A_WORKSPACE: i64 = 5;

/// coderd's database, with its base rows.
pub struct Coderd {
    pub database: Database,
    /// For the deployment's id and the key of its licenses.
    pub simulation: Simulation,
}

impl Coderd {
    /// A deployment with this number of simulated builds of the last 14 days, with their usage and
    /// licenses.
    pub async fn new(servers: &Servers, builds: usize) -> Result<Coderd> {
        let database = servers.database().await?;
        let now = Clock::system().now();
        let start = now - TimeDelta::days(14);
        let config = Config::history(7, SchemaVersion::Sep2026, start, now, builds);
        let mut simulation = Simulation::start(config, &database.url).await?;
        simulation.advance_to(now).await?;
        simulation.commit_held().await?;
        Ok(Coderd { database, simulation })
    }

    /// Adds the builds of this range of numbers. They complete one after another, `step` apart.
    pub async fn add_history(
        &self,
        builds: i64,
        first_completion: DateTime<Utc>,
        step: TimeDelta,
    ) -> Result<()> {
        let mut connection = self.database.connect().await?;
        // neither foreign keys nor triggers: the rows are right
        sqlx::query("set session_replication_role = replica").execute(&mut connection).await?;
        add_builds(&mut connection, 0, builds, first_completion, step).await?;
        sqlx::raw_sql("vacuum analyze").execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// Adds usage of one managed agent each, spread over the last ten days, with the daily sums.
    pub async fn add_usage(&self, events: i64) -> Result<()> {
        let mut connection = self.database.connect().await?;
        sqlx::query("set session_replication_role = replica").execute(&mut connection).await?;
        sqlx::query(
            "with added as (
                 insert into usage_events (id, event_type, event_data, created_at)
                 select md5('usage' || n)::uuid::text, 'dc_managed_agents_v1', '{\"count\": 1}',
                     date_trunc('second', now()) - interval '10 days' * n / $1
                 from generate_series(1, $1) n returning created_at
             )
             insert into usage_events_daily (day, event_type, usage_data)
             select (created_at at time zone 'UTC')::date, 'dc_managed_agents_v1', jsonb_build_object('count', count(*)) from added group by 1
             on conflict (day, event_type) do update set usage_data = jsonb_build_object('count',
                 (usage_events_daily.usage_data ->> 'count')::bigint + (excluded.usage_data ->> 'count')::bigint)",
        )
        .bind(events)
        .execute(&mut connection)
        .await?;
        sqlx::raw_sql("vacuum analyze").execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// Completes 50 builds a second until `stop`, from this number on.
    pub fn traffic(&self, from: i64, stop: &CancellationToken) -> JoinHandle<Result<i64>> {
        let (url, stop) = (self.database.url.clone(), stop.clone());
        tokio::spawn(async move {
            let mut connection = PgConnection::connect(&url).await?;
            let (mut next, begun) = (from, Instant::now());
            for tick in 0.. {
                let due = begun + Duration::from_millis(100) * tick;
                let wait = due.saturating_duration_since(Instant::now());
                if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                    break;
                }
                let step = TimeDelta::milliseconds(1);
                add_builds(
                    &mut connection,
                    next,
                    BUILDS_OF_A_WORKSPACE,
                    Clock::system().now(),
                    step,
                )
                .await?;
                next += BUILDS_OF_A_WORKSPACE;
            }
            Ok(next)
        })
    }

    /// Seconds of coderd's own query for `coderd_workspace_creation_total`, which each replica runs
    /// once a minute (`GetRegularWorkspaceCreateMetrics`).
    pub async fn own_query_seconds(&self) -> Result<f64> {
        let mut connection = self.database.connect().await?;
        let begun = Instant::now();
        sqlx::query(
            "select template.name, coalesce(preset.name, ''), organization.name, count(*)
             from (
                 select distinct on (build.workspace_id) build.workspace_id, build.template_version_preset_id, build.initiator_id
                 from workspace_builds build join provisioner_jobs job on job.id = build.job_id
                 where build.transition = 'start' and job.job_status = 'succeeded'
                 order by build.workspace_id, build.build_number, build.id
             ) first
             join workspaces workspace on workspace.id = first.workspace_id
             join templates template on template.id = workspace.template_id and not template.deleted
             join organizations organization on organization.id = workspace.organization_id
             left join template_version_presets preset on preset.id = first.template_version_preset_id
             where first.initiator_id <> $1
             group by 1, 2, 3",
        )
        .bind(PREBUILDS_USER)
        .fetch_all(&mut connection)
        .await?;
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// Adds workspaces with five builds each: starts and stops of one owner. Ids are random, as
/// coderd's are.
async fn add_builds(
    connection: &mut PgConnection,
    from: i64,
    builds: i64,
    first_completion: DateTime<Utc>,
    step: TimeDelta,
) -> Result<()> {
    let mut tx = connection.begin().await?;
    let statements = [
        "insert into workspaces (id, created_at, updated_at, owner_id, organization_id, template_id, name)
         select md5('workspace' || n)::uuid, $3, $3, person.id, template.organization_id, template.id, 'workspace-' || n
         from generate_series($1 / 5, ($1 + $2 - 1) / 5) n
         join (select row_number() over (order by id) - 1 as at, count(*) over () as all, id from users
               where status = 'active' and not is_system and not is_service_account) person on person.at = n % person.all
         join (select row_number() over (order by id) - 1 as at, count(*) over () as all, id, organization_id from templates) template
             on template.at = n % template.all
         where $4 is not null",
        "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id)
         select md5('job' || n)::uuid, done.at - interval '61 seconds', done.at, done.at - interval '60 seconds', done.at,
             workspace.organization_id, workspace.owner_id, 'terraform', 'file', 'workspace_build',
             jsonb_build_object('workspace_build_id', md5('build' || n)::uuid, 'dry_run', false), md5('worker' || n % 8)::uuid, md5('file')::uuid
         from generate_series($1, $1 + $2 - 1) n cross join lateral (select $3 + (n - $1) * $4 as at) done
         join workspaces workspace on workspace.id = md5('workspace' || n / 5)::uuid",
        "insert into workspace_builds (id, created_at, updated_at, workspace_id, template_version_id, build_number, transition,
             initiator_id, job_id, template_version_preset_id, daily_cost)
         select md5('build' || n)::uuid, done.at - interval '61 seconds', done.at, workspace.id, version.id, n % 5 + 1,
             (case when n % 5 in (1, 3) then 'stop' else 'start' end)::workspace_transition, workspace.owner_id, md5('job' || n)::uuid,
             preset.id, 10
         from generate_series($1, $1 + $2 - 1) n cross join lateral (select $3 + (n - $1) * $4 as at) done
         join workspaces workspace on workspace.id = md5('workspace' || n / 5)::uuid
         join (select distinct on (template_id) template_id, id from template_versions order by template_id, id) version
             on version.template_id = workspace.template_id
         left join (select distinct on (template_version_id) template_version_id, id from template_version_presets
                    order by template_version_id, id) preset on preset.template_version_id = version.id",
    ];
    for statement in statements {
        sqlx::query(statement)
            .bind(from)
            .bind(builds)
            .bind(first_completion)
            .bind(step)
            .execute(&mut *tx)
            .await?;
    }
    Ok(tx.commit().await?)
}
