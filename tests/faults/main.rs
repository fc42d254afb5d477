//! The fault harness: real servers and processes under fault schedules drawn from seeds. Afterwards
//! every number must be true.
//!
//! `scripts/test --faults N --seed S` runs N schedules, of the seeds S, S+1, …. `scripts/test` runs
//! a few with all other tests.

// Some test uses each shared module; which of its items are used depends on the tests.
#![allow(dead_code)]

#[path = "../it/journey/expected.rs"]
mod expected;
#[path = "../it/journey/exposition.rs"]
mod exposition;
mod foreign;
mod inject;
#[path = "../it/oracle/mod.rs"]
mod oracle;
mod outage;
#[path = "../it/journey/proof.rs"]
mod proof;
#[path = "../it/operate/proxy.rs"]
mod proxy;
mod runs;
mod schedule;
mod servers;
mod settle;
#[path = "../it/journey/simulated.rs"]
mod simulated;
#[path = "../it/journey/site.rs"]
mod site;
mod source;
#[path = "../it/support/mod.rs"]
mod support;
mod traffic;
mod walk;
#[path = "../it/journey/watch.rs"]
mod watch;
mod world;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use runs::Runs;
use schedule::{Kind, Schedule};
use servers::Servers;
use world::World;

/// One test at a time: they measure time.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_books_balance_after_every_schedule_of_faults() {
    let _turn = TURN.lock().await;
    let runs = Runs::asked_for();
    let mut servers = None;
    for seed in runs.seeds() {
        if runs.has_passed(seed) {
            runs.report(&format!("seed {seed} passed before, on this commit: skipped"));
            continue;
        }
        let schedule = Schedule::of(seed);
        runs.report(&schedule.to_string());
        let begun = Instant::now();
        let run = async {
            let servers = match &mut servers {
                Some(servers) => servers,
                none => none.insert(Servers::start().await),
            };
            run_schedule(&schedule, servers).await
        };
        let summary = runs.watch_over(&schedule, run).await;
        runs.passed(seed);
        runs.report(&format!(
            "seed {seed} passed in {:.1} s: {summary}",
            begun.elapsed().as_secs_f64()
        ));
    }
}

/// Runs one schedule with continuous traffic.
async fn run_schedule(schedule: &Schedule, servers: &mut Servers) -> String {
    let (mut world, simulation) = World::begin(schedule.seed, schedule.backend, servers).await;
    let (coderd, stop) = (Arc::new(Mutex::new(simulation)), CancellationToken::new());
    // a separate task: coderd lives on while faults block
    let traffic_task = tokio::spawn(traffic::live(Arc::clone(&coderd), stop.clone()));
    for round in &schedule.rounds {
        world.run_round(round, servers, &coderd).await;
    }
    stop.cancel();
    traffic_task.await.expect("traffic");
    world.say("the traffic has ended");
    if schedule.has(Kind::TransactionalNoise) {
        world.partitions_end_in_aborted_records().await;
    }
    let truth = coderd.lock().await.truth();
    world.settle(&truth).await;
    let summary = world.proves(&truth).await;
    world.end_all(servers).await;
    summary
}
