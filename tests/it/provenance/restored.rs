//! A ledger that is restored from a backup without the cutover: it rejects the same records again.

use std::path::PathBuf;
use tallyline::ledger::cutover;

use serde_json::Value;
use tallyline::consumer::Consumer;
use tallyline::event::Signatures;
use tallyline::operations::recover::Lost;
use tempfile::TempDir;

use super::world::{World, events, keys};

fn key() -> Signatures {
    keys(&["2026"], "2026")
}

/// A ledger that has rejected forged records since the cutover, the process that recorded it, and
/// an older backup.
struct Forged {
    world: World,
    consumer: Consumer,
    backup: PathBuf,
    books: Vec<Value>,
    _folder: TempDir,
}

impl Forged {
    async fn new() -> Forged {
        let (world, folder) = (World::new().await, TempDir::new().unwrap());
        world.collect(&events(0..20), Signatures::default()).await;
        world.consume(Signatures::default()).await;
        let backup = world.database.back_up(folder.path());
        let consumer = world.consumer(key());
        world.consume_with(&consumer).await;
        world.produce(events(20..40).iter().map(|event| (event.topic(), event.to_message()))).await;
        world.consume_with(&consumer).await;
        let books = world.books().await;
        let forged = Forged { world, consumer, backup, books, _folder: folder };
        forged.all_are_rejected().await;
        forged
    }

    async fn all_are_rejected(&self) {
        assert_eq!(self.world.books().await, self.books);
        assert_eq!(self.world.causes().await, ["unsigned"]);
        assert_eq!(self.world.count("select count(*) from reject").await, 60);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_recorded_between_the_restore_and_its_recovery_binds_from_the_position() {
    let forged = Forged::new().await;
    let world = &forged.world;
    world.restore(&forged.backup).await;
    // another process leases a partition before the recovery is opened
    world
        .ledger
        .run(async |conn| cutover::begin(conn, &world.ends().await, world.ledger.clock.now()).await)
        .await
        .unwrap();
    world.recover(Lost::Ledger, key()).await;
    world.consume(key()).await;
    forged.all_are_rejected().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_consumer_reads_nothing_unsigned_before_the_recovery_is_opened() {
    let forged = Forged::new().await;
    forged.world.restore(&forged.backup).await;
    forged.world.consume_with(&forged.consumer).await;
    forged.all_are_rejected().await;
}
