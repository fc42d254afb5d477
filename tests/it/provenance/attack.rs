//! An attacker who may produce but has no key. If keys are set, no number, series, id or bill
//! changes.

use tallyline::event::{Event, Message, Payload, Signatures, Signer, Topic, Usage, UsageQuantity};
use tempfile::TempDir;
use uuid::Uuid;

use super::world::{World, events, keys};
use crate::support::ledger::{DEPLOYMENT, build, claim, usage};

const OLD_KEY: &str = "2026";
const NEW_KEY: &str = "2027";

fn forged(event: Event) -> (Topic, Message) {
    (event.topic(), event.to_message())
}

/// The same id with other content.
fn altered(event: &Event) -> Event {
    let mut altered = event.clone();
    match &mut altered.payload {
        Payload::Build(build) => build.build_number += 1,
        Payload::Claim(claim) => claim.build_number += 1,
        Payload::Usage(usage) => usage.quantity = UsageQuantity::ManagedAgents(2_000_000),
    }
    altered
}

/// The same digest with another name or a publish mark.
fn relabelled(event: &Event) -> Event {
    let mut altered = event.clone();
    match &mut altered.payload {
        Payload::Build(build) => build.template_name = "forged".into(),
        Payload::Claim(claim) => claim.template_name = "forged".into(),
        Payload::Usage(usage) => usage.marks.published_at = Some(usage.created_at),
    }
    altered
}

/// Puts the signature of one record on another.
fn with_signature_of(message: Message, signed: &Message) -> Message {
    let mut message = message;
    message.headers.extend(
        signed.headers.iter().filter(|(name, _)| name == tallyline::event::SIGNATURE).cloned(),
    );
    message
}

/// Appends every kind of record that a producer can. `events` are true ones, in the log or not.
async fn attack(world: &World, events: &[Event]) {
    let series = (0..5_000).map(|n| {
        let mut event = build(DEPLOYMENT, 100_000 + n);
        if let Payload::Build(build) = &mut event.payload {
            build.template_name = format!("forged-{n}");
        }
        forged(event)
    });
    let agents = Usage {
        id: "forged".into(),
        quantity: UsageQuantity::ManagedAgents(2_000_000),
        ..usage_of(&usage(DEPLOYMENT, 0))
    };
    let numbers = [
        Event { deployment: DEPLOYMENT, payload: Payload::Usage(agents) },
        claim(DEPLOYMENT, 100_000),
    ];
    let deployments = (0..1_500).map(|n| forged(usage(Uuid::from_u128(0xf000 + n), 1)));
    world.produce(series.chain(numbers.map(forged)).chain(deployments)).await;
    world
        .produce(
            events
                .iter()
                .flat_map(|event| [event.clone(), altered(event), relabelled(event)])
                .map(forged),
        )
        .await;

    // a key of the same name, records that are in the log, and their signatures on other records
    let own = Signatures::new([(OLD_KEY.to_owned(), vec![0; 32])].into(), Some(OLD_KEY.to_owned()))
        .unwrap();
    let sign = |event: Event| {
        (
            event.topic(),
            own.signed(Signer::Collector, &world.topic_name(event.topic()), event.to_message()),
        )
    };
    world.produce(events.iter().map(|event| sign(altered(event)))).await;
    let there = world.records().await;
    let signed = there.into_iter().filter(|(_, message)| {
        message.headers.iter().any(|(name, _)| name == tallyline::event::SIGNATURE)
    });
    let mut copies = Vec::new();
    for (topic, message) in signed.take(500) {
        // another key selects another partition, which may be read first
        copies.push((topic, Message { key: Some(b"elsewhere".to_vec()), ..message.clone() }));
        let Ok(event) = tallyline::event::parse_in(topic, &message) else { continue };
        copies.push((topic, with_signature_of(relabelled(&event).to_message(), &message)));
        copies.push((topic, with_signature_of(altered(&event).to_message(), &message)));
    }
    world.produce(copies).await;
}

fn usage_of(event: &Event) -> Usage {
    match &event.payload {
        Payload::Usage(usage) => usage.clone(),
        _ => unreachable!("it is usage"),
    }
}

/// The books without an attacker.
async fn honest(events: &[Event]) -> Vec<serde_json::Value> {
    let world = World::new().await;
    world.collect(events, Signatures::default()).await;
    world.consume(Signatures::default()).await;
    let books = world.books().await;
    let all = serde_json::to_string(&books).unwrap();
    for words in [
        "coderd_workspace_creation_total{",
        "coderd_prebuilt_workspace_claim_duration_seconds_count{",
        "\"agents\"",
    ] {
        assert!(all.contains(words), "the books say {words}");
    }
    books
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_to_produce_changes_no_number_series_id_or_bill() {
    let (world, folder) = (World::new().await, TempDir::new().unwrap());
    let all = events(0..60);
    let (before, after) = all.split_at(60);
    let old_key = || keys(&[OLD_KEY], OLD_KEY);
    world.collect(before, Signatures::default()).await;
    world.consume(Signatures::default()).await;
    let without_cutover = world.database.back_up(folder.path());

    // from the first record after the cutover, and before the true rows are there
    world.consume(old_key()).await;
    attack(&world, &all).await;
    world.collect(after, old_key()).await;
    attack(&world, &all).await;
    world.consume(old_key()).await;
    let books = honest(&all).await;
    assert_eq!(world.books().await, books);
    assert_eq!(world.causes().await, ["bad_signature", "unsigned"]);
    assert_eq!(
        world.count("select count(*) from source").await,
        1,
        "no forged deployment is a source"
    );
    assert_eq!(
        world.count("select count(*) from workspace_build where confirmed_at is not null").await,
        40
    );

    assert_eq!(world.replay(old_key()).await, 0, "a replay of all topics adds nothing");
    assert_eq!(world.books().await, books);

    // the backup has no cutover: true records are accepted again, and no others
    world.lose_ledger(&without_cutover, old_key()).await;
    world.consume(old_key()).await;
    world.collect(&all, old_key()).await;
    attack(&world, &all).await;
    world.consume(old_key()).await;
    assert_eq!(world.books().await, books);
    assert_eq!(world.causes().await, ["bad_signature", "unsigned"]);
    assert_eq!(world.replay(old_key()).await, 0);

    // in new topics every record must be signed
    world.lose_kafka(old_key()).await;
    attack(&world, &all).await;
    world.collect(&all, old_key()).await;
    world.consume(old_key()).await;
    assert_eq!(world.books().await, books);

    // another key signs, and the old one still verifies
    let both = || keys(&[OLD_KEY, NEW_KEY], NEW_KEY);
    let more = events(60..70);
    attack(&world, &more).await;
    world.collect(&more, both()).await;
    world.consume(both()).await;
    let books = honest(&[all, more].concat()).await;
    assert_eq!(world.books().await, books);
    assert_eq!(world.replay(both()).await, 0, "records of the old key are still read");
    assert_eq!(world.books().await, books);
}
