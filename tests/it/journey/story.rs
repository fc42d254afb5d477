//! The journey, step by step. coderd's history goes on while processes are killed and restarted.

use std::time::{Duration, Instant};
use tallyline::ledger::{books, snapshots, sources};

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline_sim::coderd::{Config, SchemaVersion, Simulation, live};
use tallyline_sim::tallyman::{Switches, Tallyman};
use tokio_util::sync::CancellationToken;

use super::simulated::{introduction, pipeline, vendor};
use super::site::{Backend, Serve, Site};
use super::watch::{Observations, Watch};
use crate::support::process::Process;
use crate::support::{self, Database, eventually};

/// Longer than any lease: a killed process is replaced within it.
pub const SOON: Duration = Duration::from_secs(60);
const DAYS: i64 = 25;
const BUILDS: usize = 5000;
/// Longer than a transaction of coderd is open: two minutes of coderd's time at most.
const LONGEST_HOLD: TimeDelta = TimeDelta::minutes(10);

/// Lines of the pipeline file.
pub const PACE: &str =
    "collect.poll_seconds = 1\ncollect.margin_seconds = 5\npublish.request_timeout_seconds = 4\n";

pub struct Journey {
    pub site: Site,
    pub coderd: Database,
    pub simulation: Simulation,
    pub tallyman: Tallyman,
    pub introduced_at: DateTime<Utc>,
    pub serve: [Serve; 2],
    pub collect: Process,
    pub consume: [Process; 2],
    pub publish: Process,
    pub watch: Option<Watch>,
    pub kills_of_publishers: usize,
    phase: Instant,
}

impl Journey {
    /// Writes the first part of the history without Tallyline, then starts all processes. The
    /// collector lives at the end of that part.
    pub async fn begin(backend: Backend, schema: SchemaVersion, seed: u64) -> Journey {
        let phase = Instant::now();
        let coderd = support::database().await;
        let end = Clock::system().now() - TimeDelta::minutes(4);
        let start = end - TimeDelta::days(DAYS);
        let part = |part: f64| instant(start, end, part);
        let config = Config {
            coderd_publishes_until: Some(part(0.2)),
            ..Config::history(seed, schema, start, end, BUILDS)
        };
        let mut simulation = Simulation::start(config, &coderd.url).await.unwrap();
        simulation.advance_to(part(FIRST_PART)).await.unwrap();
        assert!(simulation.completed_builds() > 2000 && simulation.usage_rows() > 400);

        let introduced_at = introduction(&simulation, part(0.43));
        let tallyman = vendor(&simulation, Switches::default(), &CancellationToken::new()).await;
        let site =
            Site::new(backend, &pipeline(&coderd, &simulation, &tallyman, introduced_at, PACE))
                .await;
        let collect = site.start(
            "collect",
            &["--clock-offset", &seconds_from_now(part(FIRST_PART) - LONGEST_HOLD)],
        );
        let consume = [site.start("consume", &[]), site.start("consume", &[])];
        let publish = site.start("publish", &[]);
        let serve = [Serve::start(&site), Serve::start(&site)];
        let mut journey = Journey {
            site,
            coderd,
            simulation,
            tallyman,
            introduced_at,
            serve,
            collect,
            consume,
            publish,
            watch: None,
            kills_of_publishers: 0,
            phase,
        };
        journey.done("history begun, all started");
        journey
    }

    /// Kills a consumer during the first pass. Waits for the first page with domain series.
    pub async fn backfill(&mut self) {
        self.watch = Some(Watch::start(self.serve.each_ref().map(|serve| serve.metrics.clone())));
        eventually(SOON, "the first events are in the ledger", || async {
            self.site.accepted().await > 0
        })
        .await;
        let there = self.site.accepted().await;
        kill_and_start_again(&mut self.consume[0], || self.site.start("consume", &[]));
        eprintln!("consumer 0 killed at {there} events");
        eventually(SOON, "the domain series are shown", || async { !self.holders().is_empty() })
            .await;
        if self.holders() == [1] {
            // the first to take the lease becomes number 0
            self.serve.swap(0, 1);
        }
        self.done("backfilled and shown");
    }

    /// While the history goes on, kills the process that shows the series and the other consumer.
    /// Freezes the publisher with a request in flight, then kills it.
    pub async fn handed_over(&mut self) {
        let before = self.site.accepted().await;
        self.tallyman.set_switches(Switches { latency_ms: 1500, ..Switches::default() }).unwrap();
        let middle = f64::midpoint(FIRST_PART, SECOND_PART);
        self.history(FIRST_PART, middle, 4).await;
        eventually(SOON, "the next events come in", || async {
            self.site.accepted().await > before
        })
        .await;
        let there = self.site.accepted().await;
        self.serve[0].process.kill();
        kill_and_start_again(&mut self.consume[1], || self.site.start("consume", &[]));
        eprintln!("the first server and consumer 1 killed at {there} events");
        self.kill_publisher_during_a_request().await;
        self.history(middle, SECOND_PART, 4).await;
        self.await_holder(1, "the series are handed over").await;
        self.serve[0].start_again(&self.site);
        self.all_of_coderd_is_in().await;
        let renames = self.simulation.rename_things(self.at(SECOND_PART)).await.unwrap();
        assert_eq!(renames.len(), 6, "{renames:?}");
        self.done("handed over, all in, things renamed");
    }

    /// Continues the history to its end. Kills the collector in its pass, and freezes a consumer
    /// until others have its partitions. The series move back.
    pub async fn handed_back(&mut self) {
        let sequence = self.site.ledger.run(snapshots::head).await.unwrap().number;
        eventually(SOON, "the first is up again", || self.serve[0].has_folded(sequence)).await;
        let (before, pass) = (self.site.appended().await, self.newest_pass().await);
        self.history(SECOND_PART, 1.0, 4).await;
        eventually(SOON, "the next records are appended", || async {
            self.site.appended().await > before
        })
        .await;
        self.consume[0].pause();
        let offset = seconds_from_now(self.at(FIRST_PART) - LONGEST_HOLD);
        kill_and_start_again(&mut self.collect, || {
            self.site.start("collect", &["--clock-offset", &offset])
        });
        self.serve[1].process.kill();
        eprintln!(
            "the second server killed, and the collector {}",
            if self.newest_pass().await == pass { "within its pass" } else { "after its pass" }
        );
        self.await_holder(0, "the series are handed back").await;
        eventually(SOON, "the other consumer reads on alone", || self.site.has_read_all()).await;
        self.consume[0].resume();
        self.simulation.commit_held().await.unwrap();
        self.all_of_coderd_is_in().await;
        // the collector lives in the past, so its completeness was true; after the first pass it
        // read only possibly new rows
        let progress = "select late, swept_pass_id from collector_progress";
        let (late, last_sweep): (i64, i64) =
            sqlx::query_as(progress).fetch_one(&self.site.database.pool).await.unwrap();
        assert_eq!((late, last_sweep), (0, 1));
        self.done("handed back, all of the history is in");
    }

    /// Ends the collector in order and starts another one in the present; coderd goes on for some
    /// seconds, too.
    pub async fn live(&mut self) {
        end_in_order(&mut self.collect).await;
        self.collect = self.site.start("collect", &[]);
        let before = self.simulation.completed_builds();
        let (clock, stop) = (Clock::system(), CancellationToken::new());
        let completed = "select count(*) from workspace_builds build join provisioner_jobs job on job.id = build.job_id where completed_at is not null";
        let completed = || async {
            sqlx::query_scalar::<_, i64>(completed).fetch_one(&self.coderd.pool).await.unwrap()
        };
        let first = completed().await;
        let beside = async {
            let audited = self.site.command(&["audit"]).await;
            eventually(SOON, "coderd goes on", || async { completed().await > first + 100 }).await;
            stop.cancel();
            audited
        };
        let (lived, audited) =
            tokio::join!(live(&mut self.simulation, 60.0, &clock, &stop, |_| {}), beside);
        lived.unwrap();
        assert!(
            audited.status.success(),
            "the books balance beside live traffic, too: {audited:?}"
        );
        eprintln!("{} builds in real time", self.simulation.completed_builds() - before);
        // A busy machine writes builds later than the margin. The overlap finds them within a
        // minute, a sweep at once.
        let swept = self.site.command(&["collect", "sweep"]).await;
        assert!(swept.status.success(), "{swept:?}");
        self.all_of_coderd_is_in().await;
        self.done("lived in the present");
    }

    /// Waits until nothing is in flight: the log is read to its ends, every publication is settled,
    /// everything is folded.
    pub async fn settled(&mut self) {
        eventually(SOON, "the log is read to its ends", || self.site.has_read_all()).await;
        let pending = "select count(*) from publication where state = 'pending'";
        eventually(SOON, "every publication is settled", || async {
            sqlx::query_scalar::<_, i64>(pending).fetch_one(&self.site.database.pool).await.unwrap()
                == 0
        })
        .await;
        self.all_is_folded().await;
        self.done("settled");
    }

    /// Waits until the shown state contains everything that the ledger has at this call.
    pub async fn all_is_folded(&self) {
        let sequence = self.site.ledger.run(snapshots::head).await.unwrap().number;
        eventually(SOON, "the folds are at the ledger's end", || {
            self.serve[0].has_folded(sequence)
        })
        .await;
    }

    /// Ends all processes in order. Checks that the scraper has seen no fault.
    pub async fn ended(&mut self) {
        let Observations { series, holders, pages, changed, faults } =
            self.watch.take().expect("it watches").end().await;
        assert!(faults.is_empty(), "{}: {:?}", faults.len(), &faults[..faults.len().min(5)]);
        assert_eq!(holders.len(), 3, "shown by one, the other, and the first again: {holders:?}");
        assert!(
            holders[0] == holders[2] && !series.is_empty() && changed > 3,
            "{holders:?}, {changed} of {pages} pages were new"
        );
        eprintln!("{pages} pages, {changed} of them new, {} series", series.len());
        let [first, second] = &mut self.consume;
        for process in
            [&mut self.collect, first, second, &mut self.publish, &mut self.serve[0].process]
        {
            end_in_order(process).await;
        }
        self.done("ended");
    }

    pub async fn source_id(&self) -> i16 {
        self.site
            .ledger
            .run(async |conn| sources::get(conn, self.simulation.deployment().id).await)
            .await
            .unwrap()
            .expect("introduced")
            .id
    }

    pub async fn newest_pass(&self) -> i64 {
        self.site
            .ledger
            .run(async |conn| books::newest_pass(conn, self.source_id().await).await)
            .await
            .unwrap()
    }

    /// Waits until the ledger has a pass that began after this call, and all before it.
    pub async fn all_of_coderd_is_in(&self) {
        let (source_id, newest) = (self.source_id().await, self.newest_pass().await);
        let what = "all that coderd committed is in the ledger";
        eventually(SOON, what, || async {
            self.site
                .ledger
                .run(async |conn| books::later_pass_is_in(conn, source_id, newest).await)
                .await
                .unwrap()
        })
        .await;
    }

    /// Commits it in `parts` parts, as coderd's replicas commit one after the other.
    pub async fn history(&mut self, from: f64, to: f64, parts: i32) {
        for part in 1..=parts {
            let until = self.at(from + (to - from) * f64::from(part) / f64::from(parts));
            self.simulation.advance_to(until).await.unwrap();
        }
    }

    /// Freezes the publisher while the vendor works; the vendor accepts the events, and the answer
    /// is never read.
    async fn kill_publisher_during_a_request(&mut self) {
        eventually(SOON, "a request is in flight", || async {
            self.tallyman.books().in_flight > 0
        })
        .await;
        self.publish.pause();
        eventually(SOON, "the vendor has taken it", || async {
            self.tallyman.books().in_flight == 0
        })
        .await;
        kill_and_start_again(&mut self.publish, || self.site.start("publish", &[]));
        self.kills_of_publishers += 1;
        self.tallyman.set_switches(Switches::default()).unwrap();
    }

    pub fn holders(&self) -> Vec<usize> {
        self.watch.as_ref().map(Watch::holders).unwrap_or_default()
    }

    async fn await_holder(&self, index: usize, what: &str) {
        eventually(SOON, what, || async { !self.serve[index].domain_lines().await.is_empty() })
            .await;
    }

    pub fn at(&self, part: f64) -> DateTime<Utc> {
        let config = self.simulation.config();
        instant(config.start, config.end, part)
    }

    /// Logs a step and its duration.
    pub fn done(&mut self, what: &str) {
        eprintln!("{:6.1} s: {what}", self.phase.elapsed().as_secs_f64());
        self.phase = Instant::now();
    }
}

/// The parts of the history at which it pauses. The second is at a point where a template may be
/// deleted.
pub const FIRST_PART: f64 = 0.55;
pub const SECOND_PART: f64 = 0.75;

pub fn instant(start: DateTime<Utc>, end: DateTime<Utc>, part: f64) -> DateTime<Utc> {
    start + TimeDelta::seconds(((end - start).num_seconds() as f64 * part) as i64)
}

fn seconds_from_now(at: DateTime<Utc>) -> String {
    (at - Clock::system().now()).num_seconds().to_string()
}

fn kill_and_start_again(process: &mut Process, start: impl FnOnce() -> Process) {
    process.kill();
    *process = start();
}

/// Checks that it reports its stop only after it, and that it reported no error of its own.
async fn end_in_order(process: &mut Process) {
    assert!(!process.stderr().contains("stopped"), "{}", process.stderr());
    assert!(process.terminate(SOON).await.success(), "{}", process.stderr());
    let output = process.stderr();
    assert!(
        !output.contains(" ERROR ")
            && output.lines().last().is_some_and(|last| last.ends_with("stopped")),
        "{output}"
    );
    output.lines().filter(|line| line.contains(" WARN ")).for_each(|line| eprintln!("{line}"));
}
