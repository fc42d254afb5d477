//! The HTTP side on a real ledger: several processes with separate folds over one database.

mod answers;
mod connections;
mod contract;
mod dashboards;
mod domain;
mod prometheus;
mod readiness;
mod rebuild;
mod rejects;

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use tallyline::api::{Addresses, Api, ProcessHandles, ServeSettings, Server};
use tallyline::event::{Event, Topic, TopicPartition};
use tallyline::ledger::{Chain, Lease, Ledger, NewPass, Source, passes, positions, sources};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::pauses::Paused;
use tallyline::projection::{Projection, ProjectionSettings, View};
use tallyline::stages::{LicensesState, MetricsState, Stage};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::ledger::{
    arrival, lease_partition, ledger, noon, operations, record_batch, register, take_lease,
};
use crate::support::{Database, assert_described, eventually, in_memory};

const SOON: Duration = Duration::from_secs(30);
/// Short, so that a dead process is replaced soon.
const LEASE: Duration = Duration::from_secs(1);

/// Sites at a time: with more, processes do not renew leases of a second in time.
static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(if in_memory() { 3 } else { 2 }));

/// A ledger and its log, ready to be served.
struct Site {
    ledger: Ledger,
    log: Log,
    _database: Database,
    _turn: SemaphorePermit<'static>,
}

impl Site {
    async fn new() -> Site {
        let turn = TURNS.acquire().await.expect("it stays open");
        let (database, ledger) = ledger().await;
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.unwrap();
        Site { ledger, log, _database: database, _turn: turn }
    }

    /// A source with a collector.
    async fn collected(&self, deployment: Uuid) -> Source {
        self.ledger
            .run(async |conn| {
                sources::register(conn, deployment, noon(), None, self.ledger.clock.now()).await
            })
            .await
            .unwrap()
    }

    /// The lease of the source's collector.
    async fn lease(&self, source: &Source) -> Lease {
        let name = format!("collector:{}", source.deployment_id);
        take_lease(&self.ledger, &name, "test", SOON).await.unwrap().expect("the tests' own")
    }

    /// A full pass of the source's collector, complete until noon. It ends at the ledger's position
    /// of each topic, and `ahead` records further in the builds' topic.
    async fn pass(&self, source: &Source, ahead: i64) {
        let mut offsets = self.ledger.run(positions::list).await.unwrap();
        for (at, next_offset) in &mut offsets {
            *next_offset += if at.topic == Topic::WorkspaceBuilds { ahead } else { 0 };
        }
        let pass = NewPass {
            source_id: source.id,
            started_at: noon(),
            complete_until: Some(noon()),
            full_sweep: true,
            offsets,
            ..NewPass::default()
        };
        self.ledger
            .run(async |conn| passes::record(conn, &self.lease(source).await, &pass).await)
            .await
            .unwrap();
    }

    /// Appends the events to the log and records them, as a consumer does.
    async fn record(&self, topic: Topic, events: Vec<Event>) {
        register(&self.ledger, &events.iter().map(|event| event.deployment).collect::<Vec<_>>())
            .await;
        let partition = TopicPartition { topic, partition: 0 };
        let claim = lease_partition(&self.ledger, partition, 0).await.unwrap();
        self.log.append(topic, events.iter().map(Event::to_message).collect()).await.unwrap();
        let next_offset = claim.next_offset + i64::try_from(events.len()).unwrap();
        let arrivals: Vec<_> = (claim.next_offset..)
            .zip(events)
            .map(|(offset, event)| arrival(offset, event))
            .collect();
        record_batch(&self.ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
    }

    fn api(
        &self,
        ledger: &Ledger,
        metrics: View<MetricsState>,
        licenses: View<LicensesState>,
    ) -> Api {
        let addresses =
            Addresses { ledger: "the ledger's".to_owned(), log: "the log's".to_owned() };
        let operations = operations(ledger, &self.log);
        let own = ProcessHandles {
            ledger: ledger.clone(),
            log: self.log.clone(),
            addresses,
            registry: ::prometheus::Registry::new(),
            stopped_partitions: None,
            coderd: None,
            publisher: None,
            paused: Paused::never(),
        };
        Api { own, operations, clock: ledger.clock.clone(), metrics, licenses }
    }

    /// A process with the role `serve`, on its own ports.
    async fn process(&self) -> Process {
        self.process_with(|_, _| {}).await
    }

    async fn process_with(&self, change: impl FnOnce(&mut ServeSettings, &mut Api)) -> Process {
        let folds = CancellationToken::new();
        let mut api =
            self.api(&self.ledger, fold(&self.ledger, &folds), fold(&self.ledger, &folds));
        let mut settings = settings();
        change(&mut settings, &mut api);
        Process::start(settings, api, folds).await
    }
}

fn settings() -> ServeSettings {
    let free = ([127, 0, 0, 1], 0).into();
    ServeSettings {
        api_listen: free,
        metrics_listen: free,
        lease_length: LEASE,
        poll: Duration::from_millis(50),
        ..ServeSettings::default()
    }
}

/// A fold that goes on until `stop`.
fn fold<S: Stage>(ledger: &Ledger, stop: &CancellationToken) -> View<S> {
    let settings =
        ProjectionSettings { poll: Duration::from_millis(50), ..ProjectionSettings::default() };
    let projection = Projection::<S>::new(ledger.clone(), settings);
    let (view, stop) = (projection.view(), stop.clone());
    tokio::spawn(async move { projection.run(&stop).await });
    view
}

/// The parts of one process with the role `serve`.
struct Process {
    api: String,
    metrics: String,
    folds: CancellationToken,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Process {
    async fn start(settings: ServeSettings, api: Api, folds: CancellationToken) -> Process {
        let server = Server::bind(settings, api).await.unwrap();
        let (api, metrics) = (server.api_address().unwrap(), server.metrics_address().unwrap());
        let stop = CancellationToken::new();
        let signal = stop.clone();
        let task = tokio::spawn(async move { server.run(&signal).await });
        Process {
            api: format!("http://{api}"),
            metrics: format!("http://{metrics}"),
            folds,
            stop,
            task,
        }
    }

    /// Ends as after SIGTERM.
    async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.task).await.expect("in time").unwrap();
        self.folds.cancel();
    }

    /// Ends as after SIGKILL: nothing is released.
    fn vanish(self) {
        self.task.abort();
        self.folds.cancel();
    }

    /// The text page: series with their values. It waits at most a quarter of a second for withheld
    /// series.
    async fn scrape(&self, query: &str) -> BTreeMap<String, f64> {
        let request =
            reqwest::Client::new().get(format!("{}/metrics?format=text{query}", self.metrics));
        let answer =
            request.header("x-prometheus-scrape-timeout-seconds", "0.5").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let page = answer.text().await.unwrap();
        assert_described(&page);
        let series = |line: &str| {
            line.rsplit_once(' ').map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
        };
        page.lines().filter(|line| !line.starts_with('#')).filter_map(series).collect()
    }

    /// The domain series of the page; empty if they are withheld.
    async fn domain(&self, query: &str) -> BTreeMap<String, f64> {
        let mut series = self.scrape(query).await;
        assert_eq!(
            series.get(concat!(
                "tallyline_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\"}"
            )),
            Some(&1.0),
            "the process's own telemetry is always there"
        );
        series.retain(|series, _| {
            series.starts_with("coderd_")
                || series.starts_with("tallyline_negative_durations_total")
        });
        series
    }

    async fn shows(&self, query: &str) -> BTreeMap<String, f64> {
        eventually(SOON, "the domain series are shown", || async {
            !self.domain(query).await.is_empty()
        })
        .await;
        self.domain(query).await
    }

    async fn telemetry(&self, series: &str) -> f64 {
        self.scrape("").await.get(series).copied().unwrap_or_else(|| panic!("no {series}"))
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        get(&format!("{}{path}", self.api)).await
    }
}

async fn get(url: &str) -> (StatusCode, Value) {
    let answer = reqwest::get(url).await.unwrap();
    (answer.status(), answer.json().await.unwrap_or_else(|error| panic!("{url}: no JSON: {error}")))
}
