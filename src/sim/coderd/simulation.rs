//! A deployment that acts: planned ahead, done step by step.

use std::collections::VecDeque;
use std::str::FromStr;

use anyhow::{Context, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};

use super::acts::{Act, Deed};
use super::books::Books;
use super::chance::{Subject, dice};
use super::config::Config;
use super::deployment::Deployment;
use super::heartbeats::Heartbeats;
use super::lives::{Lives, Pace, Window};
use super::signing::LicenseKey;
use super::truth::{Rename, Truth};
use super::{furnish, licenses, renames, schema, write};

/// A planned deployment and what has been done of it, without a database.
pub(super) struct Script {
    pub config: Config,
    pub deployment: Deployment,
    pub license_key: LicenseKey,
    pub books: Books,
    lives: Lives,
    heartbeats: Heartbeats,
    /// In order of time.
    acts: VecDeque<Act>,
    /// Up to where it is planned.
    planned_until: DateTime<Utc>,
}

impl Script {
    pub fn new(config: Config) -> anyhow::Result<Self> {
        ensure!(config.start < config.end, "a history starts before it ends");
        let deployment = Deployment::plan(&config);
        let (license_key, mut acts) = licenses::plan(&config, deployment.id, &mut dice(config.seed, Subject::Licenses))?;
        let window = Window { from: config.start, to: config.end, pace: Pace::LIFE, history: true };
        let mut lives = Lives::new(&config, &deployment);
        let mut heartbeats = Heartbeats::new(&config);
        let edges = edges(&acts);
        acts.extend(lives.promotions());
        acts.extend(lives.plan(&deployment, window, config.builds));
        acts.extend(lives.on_edges(&deployment, window, &edges));
        if config.heartbeats {
            acts.extend(heartbeats.plan(&deployment, window.from, window.to));
        }
        acts.extend(heartbeats.publishing(&acts));
        acts.sort_by_key(|act| act.at);
        let books = Books::new(&deployment);
        let planned_until = config.end;
        Ok(Script { config, deployment, license_key, books, lives, heartbeats, acts: acts.into(), planned_until })
    }

    pub fn extend(&mut self, until: DateTime<Utc>, builds: usize) {
        let window = Window { from: self.planned_until, to: until, pace: Pace::BRISK, history: false };
        if until <= window.from {
            return;
        }
        let mut acts = self.lives.plan(&self.deployment, window, builds);
        if self.config.heartbeats {
            acts.extend(self.heartbeats.plan(&self.deployment, window.from, until));
        }
        acts.extend(self.heartbeats.publishing(&acts));
        acts.extend(self.acts.drain(..));
        acts.sort_by_key(|act| act.at);
        self.acts = acts.into();
        self.planned_until = until;
    }

    /// The next act that is due at `now`, noted in the books. Presets that are gone are gone from it.
    pub fn next(&mut self, now: DateTime<Utc>) -> Option<Act> {
        let mut act = self.acts.pop_front_if(|act| act.at <= now)?;
        if let Deed::Queue(queued) = &mut act.deed {
            queued.preset = queued.preset.filter(|preset| !self.books.removed_presets.contains(preset));
        }
        self.books.note(&act);
        Some(act)
    }

    pub fn truth(&self) -> Truth {
        self.books.truth(&self.config, &self.deployment, &self.license_key)
    }
}

/// The instants at which the known licenses' windows begin and end.
fn edges(acts: &[Act]) -> Vec<DateTime<Utc>> {
    let windows = acts.iter().filter_map(|act| match &act.deed {
        Deed::License(license) if license.known_key => Some([license.claims.nbf, license.claims.exp]),
        _ => None,
    });
    windows.flatten().collect()
}

/// A simulated coderd in a PostgreSQL database of its own.
///
/// It acts only inside of [`Simulation::advance_to`], so that a caller can look, or kill something, between two steps.
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
    /// Plans everything, creates coderd's tables in an empty database and writes what stands before the first build.
    ///
    /// # Errors
    /// When the configuration makes no sense, the database cannot be reached or already holds coderd's tables.
    pub async fn start(config: Config, database_url: &str) -> anyhow::Result<Self> {
        let script = Script::new(config)?;
        let options = PgConnectOptions::from_str(database_url).context("database URL")?.application_name("coderd");
        let mut connection = connect(&options).await?;
        schema::create(&mut connection, script.config.schema).await?;
        let mut tx = connection.begin().await?;
        furnish::furnish(&mut tx, &script.config, &script.deployment).await?;
        tx.commit().await?;
        Ok(Simulation { script, options, connection, held: Vec::new() })
    }

    /// Does all that is planned up to and including `now`.
    ///
    /// Transactions that commit late stay open over the end of this call if their time has not come.
    ///
    /// # Errors
    /// When PostgreSQL refuses. The truth is then ahead of the database and the simulation of no use any more.
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

    /// Does the whole history and commits what is held open.
    ///
    /// # Errors
    /// As [`Simulation::advance_to`].
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        self.advance_to(self.script.planned_until).await?;
        self.commit_held().await
    }

    /// Plans at least `builds` more builds, brisk ones of seconds, that begin between what is planned so far and `until`. Names and
    /// templates are those of now.
    pub fn extend(&mut self, until: DateTime<Utc>, builds: usize) {
        self.script.extend(until, builds);
    }

    /// Changes acts per transaction: 1 for coderd's own transactions.
    pub fn set_acts_per_transaction(&mut self, acts: usize) {
        self.script.config.acts_per_transaction = acts.max(1);
    }

    /// Commits every transaction that is still open.
    ///
    /// # Errors
    /// When PostgreSQL refuses.
    pub async fn commit_held(&mut self) -> anyhow::Result<()> {
        self.release(DateTime::<Utc>::MAX_UTC).await
    }

    /// Transactions that are held open.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Renames an organization, a template, a preset and a workspace, removes a preset row, and deletes a template (once all its
    /// workspaces are gone, from 7/10 of the history on) whose name a new one takes. To be called when a reader has seen everything that
    /// was done: names are promised only as first seen. Open transactions are committed first.
    ///
    /// # Errors
    /// When PostgreSQL refuses.
    pub async fn rename_things(&mut self, at: DateTime<Utc>) -> anyhow::Result<Vec<Rename>> {
        self.commit_held().await?;
        let mut tx = self.connection.begin().await?;
        let done = renames::rename_things(&mut tx, &mut self.script, at).await?;
        tx.commit().await?;
        self.script.books.renames.extend(done.iter().cloned());
        Ok(done)
    }

    /// A daemon acquires a job that was canceled while pending: `started_at` and `worker_id` change behind what was seen. Gives the
    /// build whose source row changed, if there is one. Not in the truth.
    ///
    /// # Errors
    /// When PostgreSQL refuses.
    pub async fn acquire_a_canceled_job(&mut self, at: DateTime<Utc>) -> anyhow::Result<Option<uuid::Uuid>> {
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

    /// What is true by now.
    #[must_use]
    pub fn truth(&self) -> Truth {
        self.script.truth()
    }

    /// The public key that verifies the licenses.
    #[must_use]
    pub fn license_key(&self) -> &LicenseKey {
        &self.script.license_key
    }

    /// The deployment.
    #[must_use]
    pub fn deployment(&self) -> &Deployment {
        &self.script.deployment
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.script.config
    }

    /// Builds completed so far.
    #[must_use]
    pub fn completed_builds(&self) -> usize {
        self.script.books.completed()
    }

    /// Usage rows so far.
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
        let (due, held) = std::mem::take(&mut self.held).into_iter().partition(|held| held.until <= now);
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
    let mut connection = options.connect().await.context("connect to the simulated coderd's database")?;
    // Rows end the same, and a simulation that dies is begun anew.
    sqlx::query("set synchronous_commit = off").execute(&mut connection).await?;
    sqlx::query("set statement_timeout = '60s'").execute(&mut connection).await?;
    Ok(connection)
}

/// How far ahead a deployment in real time is planned.
pub(super) const PLAN_AHEAD: TimeDelta = TimeDelta::seconds(10);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::truth::{Class, Status, UsageKind};
    use super::*;
    use crate::sim::coderd::SchemaVersion;

    fn config(schema: SchemaVersion, builds: usize) -> Config {
        let start = DateTime::from_timestamp(1_780_000_000, 123_456_000).unwrap();
        Config::history(11, schema, start, start + TimeDelta::days(25), builds)
    }

    fn played(config: Config) -> Truth {
        let mut script = Script::new(config).unwrap();
        while script.next(script.config.end).is_some() {}
        script.truth()
    }

    #[test]
    fn the_same_seed_gives_the_same_truth_and_another_seed_another() {
        let once = serde_json::to_string(&played(config(SchemaVersion::TasksEra, 300))).unwrap();
        assert_eq!(once, serde_json::to_string(&played(config(SchemaVersion::TasksEra, 300))).unwrap());
        let other = Config { seed: 12, ..config(SchemaVersion::TasksEra, 300) };
        assert_ne!(once, serde_json::to_string(&played(other)).unwrap());
        assert_eq!(serde_json::from_str::<Truth>(&once).unwrap(), played(config(SchemaVersion::TasksEra, 300)));
    }

    #[test]
    fn a_history_has_what_it_was_asked_for_and_every_oddity() {
        for schema in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
            let truth = played(config(schema, 5000));
            assert!(truth.builds.len() >= 5000, "{}", truth.builds.len());
            let agents = truth.usage.iter().filter(|row| row.event_type == UsageKind::ManagedAgents).count();
            assert!(agents >= 800, "{schema:?}: {agents} agents");
            for class in [Class::RegularCreation, Class::PrebuildCreation, Class::Claim, Class::Other] {
                for status in [Status::Succeeded, Status::Failed, Status::Canceled] {
                    let expected =
                        status == Status::Succeeded || class != Class::Claim && class != Class::Other || status == Status::Failed;
                    let there = truth.builds.iter().any(|build| build.class == class && build.status == status);
                    assert!(there || !expected, "{class:?} {status:?}");
                }
            }
            let retried = |build: &&super::super::truth::BuildTruth| build.counted_as_creation && build.build_number > 1;
            assert!(truth.builds.iter().filter(retried).count() > 10);
            assert!(truth.clock_skews > 5);
            assert!(truth.builds.iter().any(|build| build.started_at == Some(build.completed_at)), "reaped with an end as its start");
            assert!(truth.builds.iter().any(|build| build.started_at.is_none() && build.status == Status::Failed));
            assert!(truth.builds.iter().any(|build| build.labels.preset_name.is_empty()));
            let organizations: BTreeSet<_> = truth.builds.iter().map(|build| &build.labels.organization_name).collect();
            let templates: BTreeSet<_> =
                truth.builds.iter().map(|build| (&build.labels.organization_name, &build.labels.template_name)).collect();
            let presets: BTreeSet<_> =
                truth.builds.iter().map(|build| &build.labels).filter(|labels| !labels.preset_name.is_empty()).collect();
            assert_eq!((organizations.len(), templates.len(), presets.len()), (3, 12, 30));
        }
    }

    #[test]
    fn licenses_have_usage_on_both_sides_of_each_edge_to_the_microsecond() {
        let truth = played(config(SchemaVersion::TasksEra, 200));
        let times: BTreeSet<_> = truth.usage.iter().map(|row| row.created_at).collect();
        let mut edges = 0;
        for license in truth.licenses.iter().filter(|license| license.verifiable) {
            for edge in [license.claims.nbf, license.claims.exp] {
                let around = [-1, 0, 1].map(|offset| times.contains(&(edge + TimeDelta::microseconds(offset))));
                assert!(around == [true; 3] || around == [false; 3], "{edge}: {around:?}");
                edges += usize::from(around[0]);
            }
            assert!(license.claims.exp <= truth.builds[0].completed_at || license.managed_agents > 0, "{license:?}");
        }
        assert!(edges >= 5, "{edges} edges");
    }

    #[test]
    fn builds_of_one_workspace_never_overlap() {
        let truth = played(config(SchemaVersion::TasksEra, 1000));
        let mut builds = truth.builds.clone();
        builds.sort_by_key(|build| (build.workspace_id, build.build_number));
        for pair in builds.windows(2).filter(|pair| pair[0].workspace_id == pair[1].workspace_id) {
            assert!(pair[0].completed_at < pair[1].created_at, "{pair:?}");
        }
    }
}
