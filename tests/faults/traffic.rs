//! coderd lives on in real time during faults.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline_sim::coderd::Simulation;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

/// Builds per second, if the machine keeps up.
const RATE: f64 = 40.0;
/// Due acts per transaction: few, because a late coderd would commit old timestamps.
const ACTS_PER_TRANSACTION: usize = 25;
/// How far ahead builds are planned.
const AHEAD: TimeDelta = TimeDelta::seconds(2);

/// The simulated coderd: it acts in steps, and faults act between steps.
pub type Coderd = Arc<Mutex<Simulation>>;

/// Acts until `stop`, then commits open transactions. Plans less while the machine is too busy.
pub async fn live(coderd: Coderd, stop: CancellationToken) {
    let clock = Clock::system();
    let mut planned = clock.now();
    {
        let mut simulation = coderd.lock().await;
        simulation.set_acts_per_transaction(ACTS_PER_TRANSACTION);
        // no builds for the time of the history's writing: they would complete before they are
        // visible
        simulation.extend(planned, 0);
    }
    let mut slowest = Duration::ZERO;
    while !stop.is_cancelled() {
        let mut simulation = coderd.lock().await;
        let now = clock.now();
        if planned < now + AHEAD / 2 {
            let until = planned.max(now) + AHEAD;
            let builds = RATE * (until - planned.max(now)).as_seconds_f64()
                / (1.0 + 4.0 * slowest.as_secs_f64());
            simulation.extend(until, builds as usize);
            (planned, slowest) = (until, Duration::ZERO);
        }
        let begun = Instant::now();
        simulation.advance_to(now).await.expect("coderd lives");
        slowest = slowest.max(begun.elapsed());
        drop(simulation);
        let _ = stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(50))).await;
    }
    coderd.lock().await.commit_held().await.expect("coderd lives");
}
