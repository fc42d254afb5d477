//! A forgery that was accepted before keys were set, and its correction.

use std::time::Duration;

use serde_json::{Value, json};
use tallyline::audit::Audit;
use tallyline::coderd::Database;
use tallyline::event::{Event, Payload, PublishMarks, Signatures, Usage, UsageQuantity};
use tallyline::ledger::sources;
use tallyline::operations::{CorrectionExecution, CorrectionRequest, Operations};
use tallyline_sim::coderd::SchemaVersion;
use tempfile::TempDir;

use super::world::{World, keys, operator};
use crate::support::coderd::Coderd;
use crate::support::ledger::{act, ask};

fn key() -> Signatures {
    keys(&["2026"], "2026")
}

fn database(coderd: &Coderd) -> Database {
    Database::new(&coderd.database.url, Duration::from_secs(30)).unwrap()
}

/// Sets both forged events to coderd's rows.
async fn correct(world: &World, coderd: &Coderd) {
    let operations = Operations {
        coderd: Some(database(coderd)),
        deployment: Some(coderd.deployment),
        ..world.operations(key())
    };
    let correction = CorrectionRequest {
        event_ids: vec!["forged".into(), "true".into()],
        source: None,
        allow_confirmed: false,
    };
    let plan = ask(&operations, &correction).await.unwrap();
    let execution = CorrectionExecution { correction, hash: plan.hash };
    act(&operations, &execution, &operator()).await.unwrap();
}

/// The differences between coderd and the ledger.
async fn differences(world: &World, coderd: &Coderd) -> Vec<(String, String)> {
    let audit = Audit {
        ledger: world.ledger.clone(),
        log: world.log(Signatures::default()),
        source: Some((database(coderd), coderd.deployment)),
        patience: Duration::ZERO,
    };
    let report = audit.run().await.unwrap();
    let found = report.joints[0].differences.iter();
    let found = found.filter(|one| ["forged", "true"].contains(&one.id.as_str()));
    found.map(|one| (one.kind.to_string(), one.id.clone())).collect()
}

/// The books, without the state of publications.
async fn counted(world: &World) -> Vec<Value> {
    let mut books = world.books().await;
    books.retain(|row| row["publication"].is_null());
    books
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrected_forgery_stays_so_through_a_replay_and_a_restored_ledger() {
    let (world, folder) = (World::new().await, TempDir::new().unwrap());
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let (deployment, at) = (coderd.deployment, world.ledger.clock.now());
    world
        .ledger
        .run(async |conn| sources::register(conn, deployment, at, None, at).await)
        .await
        .unwrap();
    let now = coderd.now().await;
    let usage = |id: &str, count| Event {
        deployment,
        payload: Payload::Usage(Usage {
            id: id.into(),
            quantity: UsageQuantity::ManagedAgents(count),
            created_at: now,
            marks: PublishMarks::default(),
        }),
    };
    coderd.usage("true", "dc_managed_agents_v1", json!({"count": 2}), now).await;
    let forged = [usage("forged", 2_000_000), usage("true", 500)];
    world.produce(forged.map(|event| (event.topic(), event.to_message()))).await;
    world.consume(Signatures::default()).await;
    world.collect(&[usage("true", 2)], Signatures::default()).await;
    world.consume(Signatures::default()).await;
    let early = world.database.back_up(folder.path());
    world.consume(key()).await;
    let found = [("not_in_source", "forged"), ("differs", "true")];
    let found = found.map(|(kind, id)| (kind.to_owned(), id.to_owned()));
    assert_eq!(differences(&world, &coderd).await, found);

    correct(&world, &coderd).await;
    assert_eq!(differences(&world, &coderd).await, []);
    let books = world.books().await;
    assert!(
        books.contains(&json!({"deployment": deployment, "events": 1, "agents": "2"})),
        "{books:?}"
    );
    assert!(books.contains(&json!({"publication": "forged", "state": "withdrawn"})), "{books:?}");
    let late = world.database.back_up(folder.path());

    assert_eq!(world.replay(key()).await, 0);
    assert_eq!(world.books().await, books);
    world.lose_ledger(&late, key()).await;
    world.consume(key()).await;
    assert_eq!(world.books().await, books);
    assert_eq!(world.replay(key()).await, 0);
    assert_eq!(world.books().await, books);

    // The backup is older than the correction: the audit finds both again, and the same command
    // gives the same counts. A request may have been sent in the lost time.
    let counts: Vec<Value> = books.into_iter().filter(|row| row["publication"].is_null()).collect();
    world.lose_ledger(&early, key()).await;
    world.consume(key()).await;
    assert_ne!(counted(&world).await, counts);
    assert_eq!(differences(&world, &coderd).await, found);
    let held = "select count(*) from publication where held_for = 'coderd_differs'";
    assert_eq!(world.count(held).await, 2);
    correct(&world, &coderd).await;
    assert_eq!(counted(&world).await, counts);
    assert_eq!(differences(&world, &coderd).await, []);
    assert_eq!(world.count("select count(*) from publication where state = 'unknown'").await, 1);
    assert_eq!(world.replay(key()).await, 0);
    assert_eq!(counted(&world).await, counts);
}
