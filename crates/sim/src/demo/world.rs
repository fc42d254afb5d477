//! Runs simulated coderd and Tallyman, with the real roles between them.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use tallyline::cli::roles::{self, Handles, Listening};
use tallyline::cli::{Context, Exit, Failure};
use tallyline::clock::Clock;
use tallyline::config;
use tallyline::ledger::{PublicationState, contents, passes, sources};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::arguments::Arguments;
use super::folder::Folder;
use super::postgres::PrivatePostgres;
use crate::coderd::truth::Truth;
use crate::coderd::{self, SchemaVersion, Simulation};
use crate::tallyman::{self, Tallyman};

/// The history in coderd before collection starts.
const HISTORY: TimeDelta = TimeDelta::days(14);
const HISTORY_BUILDS: usize = 2_000;

/// All running parts of the demo.
pub(super) struct World {
    pub site: Handles,
    pub tallyman: Tallyman,
    listening: Listening,
    pipeline: std::path::PathBuf,
    traffic: Traffic,
    roles: JoinHandle<Result<(), Failure>>,
    stop: CancellationToken,
    /// Cancelled when the roles have ended, for any reason.
    roles_ended: CancellationToken,
}

/// coderd's simulated traffic.
struct Traffic {
    stop: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<Simulation>>>,
    completed: Arc<AtomicU64>,
    /// The simulator's books when the traffic has ended, and the time of its end.
    ended: Option<(Truth, DateTime<Utc>)>,
}

impl World {
    pub async fn begin(
        arguments: &Arguments,
        context: &Context,
        folder: &Folder,
        postgres: &PrivatePostgres,
    ) -> Result<Self, Failure> {
        let simulation = history(arguments, context, postgres).await?;
        let stop = CancellationToken::new();
        let accepted = tallyman::Config {
            deployment_ids: vec![simulation.deployment().id],
            books: Some(folder.create("tallyman-books.jsonl")?.0),
            ..tallyman::Config::default()
        };
        let tallyman = Tallyman::start(accepted, context.clock.clone(), stop.clone()).await?;
        let (pipeline, mut file) = folder.create("demo.toml")?;
        file.write_all(pipeline_file(arguments, postgres, &simulation, &tallyman).as_bytes())
            .context("the pipeline file")?;
        let input = config::Input { file: pipeline.clone(), ..config::Input::default() };
        let settings =
            config::load(&input).map_err(|mistakes| Failure::of(Exit::Internal, mistakes))?;
        let site = Handles::open(settings, context.clock.clone()).await?;
        site.ledger.ledger.migrate().await?;
        let partitions = i32::try_from(site.pipeline.log.partitions).context("log.partitions")?;
        site.log.log.create_topics(partitions).await?;
        let (addresses_sender, listening) = oneshot::channel();
        let roles_ended = CancellationToken::new();
        let roles = tokio::spawn({
            let (site, stop, ended) =
                (site.clone(), stop.clone(), roles_ended.clone().drop_guard());
            async move {
                let _ended = ended;
                roles::run(site, &stop, |at| {
                    let _ = addresses_sender.send(at);
                })
                .await
            }
        });
        let Ok(listening) = listening.await else {
            return Err(roles
                .await
                .map_err(|error| Failure::new(Exit::Internal, error))?
                .err()
                .unwrap_or_else(Failure::interrupted));
        };
        let traffic = Traffic::start(simulation, arguments.rate, context);
        Ok(World { site, tallyman, listening, pipeline, traffic, roles, stop, roles_ended })
    }

    /// Addresses for the user.
    pub fn addresses(&self) -> String {
        let Listening { api, metrics } = self.listening;
        format!(
            "metrics       http://{metrics}/metrics\nentitlements  http://{api}/api/v2/entitlements\nhealth        http://{api}/readyz\n\
             Tallyman      http://{}/sim/books\nother commands take  --pipeline {}",
            self.tallyman.addr,
            self.pipeline.display()
        )
    }

    /// The progress in one line.
    pub async fn status(&self) -> anyhow::Result<String> {
        let contents = self
            .site
            .ledger
            .ledger
            .run(async |conn| contents::read(conn, self.site.ledger.ledger.clock.now()).await)
            .await?;
        let events: i64 = contents.events.iter().map(|count| count.events).sum();
        let pending: i64 = contents
            .publications
            .iter()
            .filter(|count| count.state == PublicationState::Pending)
            .map(|count| count.events)
            .sum();
        let complete = self
            .completeness()
            .await?
            .map_or("not yet".to_owned(), |until| until.format("%H:%M:%S").to_string());
        let books = self.tallyman.books();
        Ok(format!(
            "builds {}  events {events}  sequence {}  complete until {complete}  billed {}  pending {pending}",
            self.traffic.completed.load(Ordering::Relaxed),
            contents.head.sequence,
            books.billed.len(),
        ))
    }

    async fn completeness(&self) -> anyhow::Result<Option<DateTime<Utc>>> {
        let ledger = &self.site.ledger.ledger;
        let Some(source) = ledger.run(sources::list).await?.into_iter().next() else {
            return Ok(None);
        };
        Ok(ledger
            .run(async |conn| passes::completeness(conn, source.id).await)
            .await?
            .complete_until)
    }

    /// Returns when the roles have ended without a stop.
    pub async fn failed(&self) {
        self.roles_ended.cancelled().await;
    }

    pub async fn end_traffic(&mut self) -> Result<(), Failure> {
        let clock = self.site.clock.clone();
        Ok(self.traffic.end(&clock).await?)
    }

    /// Waits until everything is counted and no usage remains to be sent. Returns false if the
    /// deadline passes first.
    pub async fn settle(&self, deadline: Duration) -> anyhow::Result<bool> {
        let deadline = Instant::now() + deadline;
        let (_, ended_at) = self.traffic.ended.as_ref().context("traffic task did not end")?;
        while Instant::now() < deadline && !self.roles_ended.is_cancelled() {
            let complete = self.completeness().await?.is_some_and(|until| until > *ended_at);
            let contents = self
                .site
                .ledger
                .ledger
                .run(async |conn| contents::read(conn, self.site.ledger.ledger.clock.now()).await)
                .await?;
            let pending =
                contents.publications.iter().any(|count| count.state == PublicationState::Pending);
            if complete && !pending {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(false)
    }

    /// The books of the simulator.
    pub fn truth(&self) -> anyhow::Result<&Truth> {
        self.traffic.ended.as_ref().map(|(truth, _)| truth).context("traffic task did not end")
    }

    pub async fn stop(self) -> Result<(), Failure> {
        self.stop.cancel();
        let ended = self.roles.await.map_err(|error| Failure::new(Exit::Internal, error))?;
        self.tallyman.stopped().await?;
        ended
    }
}

impl Traffic {
    fn start(mut simulation: Simulation, rate: f64, context: &Context) -> Self {
        let (stop, clock) = (CancellationToken::new(), context.clock.clone());
        let completed = Arc::new(AtomicU64::new(simulation.completed_builds() as u64));
        let (counter, stopped) = (Arc::clone(&completed), stop.clone());
        let task = tokio::spawn(async move {
            coderd::live(&mut simulation, rate, &clock, &stopped, |builds| {
                counter.store(builds as u64, Ordering::Relaxed)
            })
            .await?;
            Ok(simulation)
        });
        Traffic { stop, task: Some(task), completed, ended: None }
    }

    async fn end(&mut self, clock: &Clock) -> anyhow::Result<()> {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            let simulation = task.await.context("the simulated coderd")??;
            self.ended = Some((simulation.truth(), clock.now()));
        }
        Ok(())
    }
}

async fn history(
    arguments: &Arguments,
    context: &Context,
    postgres: &PrivatePostgres,
) -> anyhow::Result<Simulation> {
    postgres.create_database("coderd").await?;
    postgres.create_database("tallyline").await?;
    let now = context.clock.now();
    let config = coderd::Config {
        // coderd published its usage itself until Tallyline was introduced
        coderd_publishes_until: Some(now - TimeDelta::days(2)),
        ..coderd::Config::history(
            arguments.seed,
            SchemaVersion::TasksEra,
            now - HISTORY,
            now,
            HISTORY_BUILDS,
        )
    };
    let mut simulation = Simulation::start(config, &postgres.url("coderd")).await?;
    simulation.advance_to(now).await?;
    Ok(simulation)
}

/// The settings of `pipelines/single.toml` with shorter waits.
fn pipeline_file(
    arguments: &Arguments,
    postgres: &PrivatePostgres,
    simulation: &Simulation,
    tallyman: &Tallyman,
) -> String {
    let key = simulation.license_key();
    format!(
        "# The demo's own pipeline: see pipelines/single.toml for what each key means.
roles = [\"collect\", \"consume\", \"publish\", \"serve\"]

[ledger]
url = \"{ledger}\"

[log]
kind = \"postgres\"

[source]
coderd_url = \"{coderd}\"
introduced_at = {introduced}

[collect]
poll_seconds = 0.5
margin_seconds = 1

[license.public_keys]
\"{kid}\" = '''
{pem}'''

[publish]
mode = \"sole\"
url = \"{url}\"
interval_seconds = 0.5

[serve]
api_listen = \"127.0.0.1:{api}\"
metrics_listen = \"127.0.0.1:{metrics}\"
",
        ledger = postgres.url("tallyline"),
        coderd = postgres.url("coderd"),
        // collect the whole history, so that the demo has something to show
        introduced = simulation.config().start.to_rfc3339_opts(chrono::SecondsFormat::Micros, true),
        kid = key.kid,
        pem = key.public_key_pem,
        url = tallyman.ingest_url(),
        api = arguments.api_port,
        metrics = arguments.metrics_port,
    )
}
