//! A deployment that acts in a database, step by step.

use std::str::FromStr;

use anyhow::Context;
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};

use super::acts::{Act, Change};
use super::config::Config;
use super::deployment::Deployment;
use super::purge::{self, Purge};
use super::script::Script;
use super::signing::LicenseKey;
use super::truth::{Claims, Rename, Truth};
use super::{base_rows, licenses, renames, schema, write};

/// A simulated coderd in its own PostgreSQL database.
///
/// It acts only in [`Simulation::advance_to`], so that a caller can look, or kill something,
/// between two steps.
pub struct Simulation {
    script: Script,
    options: PgConnectOptions,
    connection: PgConnection,
    /// Transactions that have written and not committed.
    held: Vec<Held>,
}

struct Held {
    connection: PgConnection,
    until: DateTime<Utc>,
}

impl Simulation {
    /// Plans everything, creates coderd's tables in an empty database and writes the rows before
    /// the first build.
    pub async fn start(config: Config, database_url: &str) -> anyhow::Result<Self> {
        let script = Script::new(config)?;
        let options = PgConnectOptions::from_str(database_url)
            .context("database URL")?
            .application_name("coderd");
        let mut connection = connect(&options).await?;
        schema::create(&mut connection, script.config.schema).await?;
        let mut tx = connection.begin().await?;
        base_rows::write(&mut tx, &script.config, &script.deployment).await?;
        tx.commit().await?;
        Ok(Simulation { script, options, connection, held: Vec::new() })
    }

    /// Does all planned acts up to and including `now`.
    ///
    /// Transactions that commit late stay open after this call if their time has not come.
    /// After an error the truth is ahead of the database: drop the simulation.
    pub async fn advance_to(&mut self, now: DateTime<Utc>) -> anyhow::Result<()> {
        let mut batch = Vec::new();
        while let Some(act) = self.script.next(now) {
            if self.held.iter().any(|held| held.until <= act.at) {
                self.commit(&mut batch).await?;
                self.release(act.at).await?;
            }
            if let Some(held_for) = act.held_for {
                self.commit(&mut batch).await?;
                self.hold(&act, act.at + held_for).await?;
                continue;
            }
            batch.push(act);
            if batch.len() >= self.script.config.acts_per_transaction {
                self.commit(&mut batch).await?;
            }
        }
        self.commit(&mut batch).await?;
        self.release(now).await
    }

    /// Does the whole history and commits open transactions.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        self.advance_to(self.script.planned_until()).await?;
        self.commit_held().await
    }

    /// Plans at least `builds` more builds that take seconds, of workspaces that begin between the
    /// end of the plan and `until`. Names and templates are current. Returns the number of planned
    /// builds, including those after `until`.
    pub fn extend(&mut self, until: DateTime<Utc>, builds: usize) -> usize {
        self.script.extend(until, builds)
    }

    /// Changes acts per transaction: 1 for coderd's own transactions.
    pub fn set_acts_per_transaction(&mut self, acts: usize) {
        self.script.config.acts_per_transaction = acts.max(1);
    }

    /// Commits every open transaction.
    pub async fn commit_held(&mut self) -> anyhow::Result<()> {
        self.release(DateTime::<Utc>::MAX_UTC).await
    }

    /// The number of open transactions.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Renames an organization, a template, a preset and a workspace, and removes a preset row.
    /// Deletes a template (once all its workspaces are gone, from 7/10 of the history on), whose
    /// name a new one takes. Call it when a reader has seen all acts: names are promised only as
    /// first seen. It commits open transactions first.
    pub async fn rename_things(&mut self, at: DateTime<Utc>) -> anyhow::Result<Vec<Rename>> {
        self.commit_held().await?;
        let mut tx = self.connection.begin().await?;
        let done = renames::rename_things(&mut tx, &mut self.script, at).await?;
        tx.commit().await?;
        self.script.books.renames.extend(done.iter().cloned());
        Ok(done)
    }

    /// A daemon acquires a job that was canceled while pending: `started_at` and `worker_id` change
    /// after a reader has seen them. Returns the build with the changed row, if there is one. The
    /// truth does not have it.
    pub async fn acquire_a_canceled_job(
        &mut self,
        at: DateTime<Utc>,
    ) -> anyhow::Result<Option<uuid::Uuid>> {
        let build = sqlx::query_scalar(
            "update provisioner_jobs as job set started_at = $1, updated_at = $1, worker_id = $2
             from workspace_builds as build
             where build.job_id = job.id and job.id = (
                 select id from provisioner_jobs where type = 'workspace_build' and canceled_at is not null and started_at is null
                     and completed_at is not null order by created_at, id limit 1)
             returning build.id",
        )
        .bind(at)
        .bind(self.script.deployment.workers[3])
        .fetch_optional(&mut self.connection)
        .await?;
        Ok(build)
    }

    /// Removes a completed build of a workspace with its job, as a cascade does. Returns the build,
    /// if there is one. The truth still has it.
    pub async fn remove_a_build(&mut self) -> anyhow::Result<Option<uuid::Uuid>> {
        let job_row: Option<(uuid::Uuid, uuid::Uuid)> = sqlx::query_as(
            "select build.id, job.id from provisioner_jobs job join workspace_builds build on build.job_id = job.id
             where job.completed_at is not null order by job.completed_at, job.id limit 1",
        )
        .fetch_optional(&mut self.connection)
        .await?;
        let Some((build, job)) = job_row else { return Ok(None) };
        sqlx::query("delete from provisioner_jobs where id = $1")
            .bind(job)
            .execute(&mut self.connection)
            .await?;
        Ok(Some(build))
    }

    /// Plans at least `builds` more builds of workspaces that begin in a past span. The next step
    /// writes their rows with those times: they become visible late. Returns the number of planned
    /// builds.
    pub fn extend_late(
        &mut self,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        builds: usize,
    ) -> usize {
        self.script.extend_late(from, until, builds)
    }

    /// From now on one of coderd's two replicas has a clock that is this far behind; zero: it is
    /// right again.
    pub fn set_clock_behind(&mut self, behind: TimeDelta) {
        self.script.set_clock_behind(behind);
    }

    /// Removes old builds. Workspaces that lost their first start restart. The truth still has all
    /// builds. Returns the ids of the removed builds.
    pub async fn purge_builds(
        &mut self,
        purge: Purge,
        now: DateTime<Utc>,
    ) -> anyhow::Result<Vec<uuid::Uuid>> {
        let mut tx = self.connection.begin().await?;
        let removed = purge::remove(&mut tx, purge).await?;
        let workspaces = purge::workspaces_without_first_start(&mut tx, purge.restarts).await?;
        tx.commit().await?;
        self.script.start_again(&workspaces, now);
        Ok(removed)
    }

    /// Uploads another license, signed by the known key.
    /// PostgreSQL refuses the same claims twice.
    pub async fn upload_license(
        &mut self,
        claims: Claims,
        at: DateTime<Utc>,
    ) -> anyhow::Result<()> {
        let id = claims.jti.parse().context("the claim jti is a UUID")?;
        let row = licenses::row(&self.script.signer, claims, id, true)?;
        let act = Act { at, held_for: None, change: Change::License(Box::new(row)) };
        self.script.books.note(&act);
        self.commit(&mut vec![act]).await
    }

    /// The truth until now.
    #[must_use]
    pub fn truth(&self) -> Truth {
        self.script.truth()
    }

    /// The public key that verifies the licenses.
    #[must_use]
    pub fn license_key(&self) -> &LicenseKey {
        self.script.signer.public()
    }

    #[must_use]
    pub fn deployment(&self) -> &Deployment {
        &self.script.deployment
    }

    #[must_use]
    pub fn config(&self) -> &Config {
        &self.script.config
    }

    #[must_use]
    pub fn completed_builds(&self) -> usize {
        self.script.books.completed()
    }

    #[must_use]
    pub fn usage_rows(&self) -> usize {
        self.script.books.usage_rows()
    }

    async fn commit(&mut self, batch: &mut Vec<Act>) -> anyhow::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut tx = self.connection.begin().await?;
        write::write(&mut tx, self.script.config.schema, batch).await?;
        tx.commit().await?;
        batch.clear();
        Ok(())
    }

    async fn hold(&mut self, act: &Act, until: DateTime<Utc>) -> anyhow::Result<()> {
        let mut connection = connect(&self.options).await?;
        sqlx::query("begin").execute(&mut connection).await?;
        write::write(&mut connection, self.script.config.schema, std::slice::from_ref(act)).await?;
        self.held.push(Held { connection, until });
        Ok(())
    }

    async fn release(&mut self, now: DateTime<Utc>) -> anyhow::Result<()> {
        let (due, held) =
            std::mem::take(&mut self.held).into_iter().partition(|held| held.until <= now);
        self.held = held;
        let due: Vec<Held> = due;
        for mut held in due {
            sqlx::query("commit").execute(&mut held.connection).await.context("commit late")?;
            held.connection.close().await?;
        }
        Ok(())
    }
}

async fn connect(options: &PgConnectOptions) -> anyhow::Result<PgConnection> {
    let mut connection =
        options.connect().await.context("connect to the simulated coderd's database")?;
    // The final rows are the same, and a simulation that fails starts again from the beginning.
    sqlx::query("set synchronous_commit = off").execute(&mut connection).await?;
    sqlx::query("set statement_timeout = '60s'").execute(&mut connection).await?;
    Ok(connection)
}
