//! The whole path: a simulated coderd and vendor, real processes with one role each, a real log and
//! a real ledger.
//!
//! Each role is killed and restarted, and everything is replayed at the end. Every final number
//! must equal the simulator's and those of coderd's own predicates.

mod bad_input;
mod books;
pub mod expected;
mod exposition;
mod proof;
pub mod simulated;
pub mod site;
pub mod story;
mod watch;

use std::time::Instant;

use tallyline_sim::coderd::SchemaVersion;

use site::Backend;
use story::Journey;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_number_is_true_in_the_end_on_kafka() {
    every_number_is_true_in_the_end(Backend::Kafka, SchemaVersion::TasksEra).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_number_is_true_in_the_end_on_the_postgres_log() {
    every_number_is_true_in_the_end(Backend::Postgres, SchemaVersion::Sep2026).await;
}

async fn every_number_is_true_in_the_end(backend: Backend, schema: SchemaVersion) {
    // Another seed gives another history: the promises hold for each.
    let seed = std::env::var("JOURNEY_SEED").map_or(20_261, |seed| seed.parse().expect("a number"));
    eprintln!("journey on {backend:?} with JOURNEY_SEED={seed}");
    let begun = Instant::now();
    let mut journey = Journey::begin(backend, schema, seed).await;
    journey.backfill().await;
    journey.handed_over().await;
    journey.handed_back().await;
    journey.live().await;
    journey.settled().await;
    journey.every_number_is_true().await;
    journey.replayed_without_effect().await;
    journey.ended().await;
    journey.every_tampered_row_is_named().await;
    eprintln!("journey on {backend:?} took {:.1?}", begun.elapsed());
}
