//! One deployment under faults: a simulated coderd that lives on, a process and proxy for each
//! role, and a vendor.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tallyline::ledger::positions;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tallyline::clock::Clock;
use tallyline::event::TopicPartition;
use tallyline_sim::coderd::{Config, SEARCH_PATH_BEFORE_PURGES, SchemaVersion, Simulation};
use tallyline_sim::tallyman::{Switches, Tallyman};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::foreign::ForeignProducer;
use crate::proxy::Proxy;
use crate::schedule::Backend;
use crate::servers::{Servers, drop_database};
use crate::simulated::{self, introduction, pipeline};
use crate::site::{Serve, Site};
use crate::support::process::Process;
use crate::support::{self, Database, database, database_on};
use crate::watch::Watch;

/// The grace period of `tallyline run` after SIGTERM, with room for a busy machine.
pub const GRACE: Duration = Duration::from_secs(20);
/// All usage is younger than the vendor's 30 days. A fast clock does not change that: usage is too
/// old only if the ledger's server agrees.
const DAYS: i64 = 20;
const BUILDS: usize = 600;
/// The vendor answers slowly, so that a killed publisher may have a request in flight.
const LATENCY_MS: u64 = 100;

/// Lines of the pipeline file.
const PACE: &str = "collect.poll_seconds = 0.5\ncollect.margin_seconds = 20\naudit.interval_seconds = 5\npublish.request_timeout_seconds = 2\npublish.concurrency = 4\n";
/// Requests of the publisher that can be in flight at once, by [`PACE`].
pub const REQUESTS_IN_FLIGHT: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Collect,
    ConsumeA,
    ConsumeB,
    /// Runs beside the other two for a while.
    ConsumeC,
    Publish,
    ServeA,
    ServeB,
}

impl Place {
    /// The processes that always run.
    pub const ALL: [Place; 6] = [
        Place::Collect,
        Place::ConsumeA,
        Place::ConsumeB,
        Place::Publish,
        Place::ServeA,
        Place::ServeB,
    ];

    fn role(self) -> &'static str {
        match self {
            Place::Collect => "collect",
            Place::ConsumeA | Place::ConsumeB | Place::ConsumeC => "consume",
            Place::Publish => "publish",
            Place::ServeA | Place::ServeB => "serve",
        }
    }

    pub fn consumes(self) -> bool {
        self.role() == "consume"
    }
}

enum Running {
    Plain(Process),
    Serve(Serve),
}

/// A process and its proxy to the ledger.
pub struct Member {
    pub place: Place,
    pub proxy: Proxy,
    ledger: String,
    running: Running,
}

impl Member {
    async fn start(site: &Site, place: Place, offset: i64) -> Member {
        let (mut proxy, url) = Proxy::to_database(&site.database.url);
        proxy.open().await;
        let (ledger, offset) = (format!("ledger.url={url}"), offset.to_string());
        let arguments = ["--set", ledger.as_str(), "--clock-offset", offset.as_str()];
        let running = match place.role() {
            "serve" => Running::Serve(Serve::start_with(site, &arguments)),
            role => Running::Plain(site.start(role, &arguments)),
        };
        Member { place, proxy, ledger, running }
    }

    pub fn process(&mut self) -> &mut Process {
        match &mut self.running {
            Running::Plain(process) => process,
            Running::Serve(serve) => &mut serve.process,
        }
    }

    fn serve(&self) -> Option<&Serve> {
        match &self.running {
            Running::Plain(_) => None,
            Running::Serve(serve) => Some(serve),
        }
    }
}

pub struct World {
    pub site: Site,
    pub coderd: Database,
    /// The same, with the builds that it has removed.
    pub coderd_before_purges: PgPool,
    pub introduced_at: DateTime<Utc>,
    pub tallyman: Tallyman,
    members: Vec<Member>,
    pub watch: Option<Watch>,
    /// How often answers to the publisher could be lost: it was killed or blocked, or the ledger was
    /// away.
    pub answers_lost: usize,
    pub slowest: Duration,
    /// Whether coderd wrote rows dated before a collector's progress.
    pub late_rows: bool,
    pub purged: Vec<Uuid>,
    /// The number of committed records of a foreign producer.
    pub foreign_records: usize,
    pub open_transaction: Option<ForeignProducer>,
    pub open_records: usize,
    pub deployment: Uuid,
    begun: Instant,
    /// Empty without a broker.
    pub brokers: String,
    pub topics: Vec<String>,
    vendor: CancellationToken,
}

impl World {
    /// Writes a history and starts all processes.
    pub async fn begin(seed: u64, backend: Backend, servers: &Servers) -> (World, Simulation) {
        World::begin_behind(TimeDelta::zero(), seed, backend, servers).await
    }

    /// The same, with a history that ended `behind` ago, and clocks that are as far behind.
    pub async fn begin_behind(
        behind: TimeDelta,
        seed: u64,
        backend: Backend,
        servers: &Servers,
    ) -> (World, Simulation) {
        let begun = Instant::now();
        let (coderd, ledger) = (database().await, database_on(&servers.postgres.url()).await);
        let simulation = history(seed, Clock::system().now() - behind, &coderd).await;
        let config = simulation.config();
        let introduced_at =
            introduction(&simulation, config.start + (config.end - config.start) / 2);
        let vendor = CancellationToken::new();
        let switches = Switches { latency_ms: LATENCY_MS, ..Switches::default() };
        let tallyman = simulated::vendor(&simulation, switches, &vendor).await;
        let kafka = (backend != Backend::Postgres).then(|| support::Kafka {
            brokers: servers.kafka.brokers.clone(),
            prefix: format!("s{}.", uuid::Uuid::new_v4().simple()),
        });
        let topics: Vec<String> = kafka
            .iter()
            .flat_map(|kafka| tallyline::event::Topic::ALL.map(|topic| kafka.name(topic.name())))
            .collect();
        let pipeline =
            pipeline(&coderd, &simulation, &tallyman, introduced_at, PACE) + group(backend);
        let site = Site::on(ledger, kafka, &pipeline).await;
        let mut members = Vec::new();
        for place in Place::ALL {
            members.push(Member::start(&site, place, -behind.num_seconds()).await);
        }
        let serve: Vec<String> =
            members.iter().filter_map(|member| Some(member.serve()?.metrics.clone())).collect();
        let watch = Some(Watch::start(serve.try_into().expect("two")));
        let slowest = Duration::ZERO;
        let coderd_before_purges = before_purges(&coderd.url).await;
        let brokers = if topics.is_empty() { String::new() } else { servers.kafka.brokers.clone() };
        let deployment = simulation.deployment().id;
        let world = World {
            site,
            coderd,
            coderd_before_purges,
            introduced_at,
            tallyman,
            members,
            watch,
            answers_lost: 0,
            slowest,
            late_rows: false,
            purged: Vec::new(),
            foreign_records: 0,
            open_transaction: None,
            open_records: 0,
            deployment,
            begun,
            brokers,
            topics,
            vendor,
        };
        world.say("all started");
        (world, simulation)
    }

    /// Logs an event with its time.
    pub fn say(&self, what: &str) {
        eprintln!("  {:5.1} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    pub fn member(&mut self, place: Place) -> &mut Member {
        self.members
            .iter_mut()
            .find(|member| member.place == place)
            .expect("the process is running")
    }

    pub fn members(&mut self) -> &mut [Member] {
        &mut self.members
    }

    pub async fn add(&mut self, place: Place) {
        let member = Member::start(&self.site, place, 0).await;
        self.members.push(member);
    }

    /// Sends SIGTERM: the process ends in order and soon. It handles signals once it has logged its
    /// start.
    pub async fn end(&mut self, place: Place) {
        let process = self.member(place).process();
        support::eventually(GRACE, "the process starts", || {
            let started = !process.stderr().is_empty();
            async move { started }
        })
        .await;
        process.signal("TERM");
        self.ends(place).await;
    }

    async fn ends(&mut self, place: Place) {
        let process = self.member(place).process();
        let status = process.ends_within(GRACE).await;
        assert!(status.success(), "{place:?}: {}", process.stderr());
        self.never_stopped(place);
        self.members.retain(|member| member.place != Place::ConsumeC || place != Place::ConsumeC);
    }

    pub fn kill(&mut self, place: Place) {
        self.member(place).process().kill();
        self.never_stopped(place);
        self.answers_lost += usize::from(place == Place::Publish);
    }

    /// None of these faults makes a partition unreadable or breaks an invariant.
    fn never_stopped(&mut self, place: Place) {
        let stderr = self.member(place).process().stderr();
        assert!(
            !stderr.contains("partition stopped") && !stderr.contains("panicked"),
            "{place:?}: {stderr}"
        );
    }

    /// Restarts it with a clock that is off by `offset` seconds.
    pub fn start(&mut self, place: Place, offset: i64) {
        let World { site, members, .. } = self;
        let member = members
            .iter_mut()
            .find(|member| member.place == place)
            .expect("the process is running");
        member.proxy.thaw();
        let offset = offset.to_string();
        let arguments = ["--set", member.ledger.as_str(), "--clock-offset", offset.as_str()];
        match &mut member.running {
            Running::Plain(process) => *process = site.start(place.role(), &arguments),
            Running::Serve(serve) => serve.start_again_with(site, &arguments),
        }
    }

    /// Ends all processes in order.
    pub async fn end_each(&mut self) {
        for place in Place::ALL {
            self.member(place).process().signal("TERM");
        }
        for place in Place::ALL {
            self.ends(place).await;
        }
    }

    /// Restarts all processes, with clocks that are `behind`.
    pub fn start_each(&mut self, behind: TimeDelta) {
        Place::ALL.into_iter().for_each(|place| self.start(place, -behind.num_seconds()));
    }

    /// The current end of each partition of the log.
    pub async fn log_ends(&self) -> Vec<(TopicPartition, i64)> {
        self.site.ends().await
    }

    /// Unread partitions up to these ends: partition, position and end.
    pub async fn behind(&self, ends: &[(TopicPartition, i64)]) -> Vec<(TopicPartition, i64, i64)> {
        let positions: BTreeMap<_, _> =
            self.site.ledger.run(positions::list).await.unwrap_or_default().into_iter().collect();
        let position = |partition| positions.get(partition).copied().unwrap_or_default();
        let behind = ends.iter().filter(|(partition, end)| position(partition) < *end);
        behind.map(|(partition, end)| (*partition, position(partition), *end)).collect()
    }

    /// The process that shows the domain series, once there is one.
    pub async fn shows(&self, within: Duration) -> &Serve {
        let series = async {
            loop {
                for serve in self.members.iter().filter_map(Member::serve) {
                    if !serve.domain_lines().await.is_empty() {
                        return serve;
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(within, series)
            .await
            .unwrap_or_else(|_| panic!("no process shows the domain series within {within:?}"))
    }

    /// Ends all processes in order and frees their resources.
    pub async fn end_all(mut self, servers: &Servers) {
        self.end_each().await;
        self.vendor.cancel();
        self.tallyman.stopped().await.expect("the vendor ends");
        self.site.ledger.pool.close().await;
        self.site.database.pool.close().await;
        self.coderd_before_purges.close().await;
        self.coderd.pool.close().await;
        servers.postgres.drop_database(&self.site.database.name).await;
        drop_database(&support::setting("TALLYLINE_TEST_POSTGRES"), &self.coderd.name).await;
        if !self.topics.is_empty() {
            servers.kafka.delete_topics(&self.topics).await;
        }
    }
}

/// Twenty days of a deployment, all committed.
async fn history(seed: u64, end: DateTime<Utc>, coderd: &Database) -> Simulation {
    let start = end - TimeDelta::days(DAYS);
    let schema =
        if seed.is_multiple_of(2) { SchemaVersion::TasksEra } else { SchemaVersion::Sep2026 };
    let published = Some(start + TimeDelta::days(DAYS / 5));
    let config = Config {
        coderd_publishes_until: published,
        ..Config::history(seed, schema, start, end, BUILDS)
    };
    let mut simulation = Simulation::start(config, &coderd.url).await.expect("coderd's tables");
    simulation.advance_to(end).await.expect("the history");
    simulation.commit_held().await.expect("the history");
    simulation
}

/// coderd's database, with the builds that it has removed.
pub async fn before_purges(url: &str) -> PgPool {
    let options: PgConnectOptions = url.parse().expect("a URL");
    let options = options.options([("search_path", SEARCH_PATH_BEFORE_PURGES)]);
    PgPoolOptions::new().max_connections(2).connect_with(options).await.expect("coderd's database")
}

/// The protocol of the consumer group.
fn group(backend: Backend) -> &'static str {
    match backend {
        Backend::KafkaNewProtocol => "kafka.properties = {'group.protocol' = 'consumer'}\n",
        Backend::Kafka | Backend::Postgres => "",
    }
}
