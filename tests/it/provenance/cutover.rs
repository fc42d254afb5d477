//! The record from which signatures are required, and the rejects after it.

use std::collections::HashMap;

use tallyline::event::{Event, RejectCause, Signatures, Topic};
use tallyline::ledger::{ActKind, NewAct, Subject, cutover, known, rejects};
use tallyline::operations::{ListRejects, OperationError, Resubmit, WhichRejects};

use super::world::{World, events, keys, operator};
use crate::support::ledger::{DEPLOYMENT, GROUP, act, ask, usage};

fn key() -> Signatures {
    keys(&["2026"], "2026")
}

fn forged(event: &Event) -> (tallyline::event::Topic, tallyline::event::Message) {
    (event.topic(), event.to_message())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsigned_records_before_the_cutover_stay_valid_and_a_signed_duplicate_confirms_them() {
    let world = World::new().await;
    let old = events(0..10);
    world.collect(&old, Signatures::default()).await;
    world.consume(Signatures::default()).await;
    assert_eq!(world.ledger.run(cutover::signed_since).await.unwrap(), None);
    world.consume(key()).await;
    assert!(world.ledger.run(cutover::signed_since).await.unwrap().is_some());
    let confirmed = "select (select count(*) from workspace_build where confirmed_at is not null)
         + (select count(*) from prebuild_claim where confirmed_at is not null) + (select count(*) from usage_event where confirmed_at is not null)";
    assert_eq!(world.count(confirmed).await, 0);
    assert_eq!(world.replay(key()).await, 0);
    assert_eq!(world.count("select count(*) from reject").await, 0, "valid records stay valid");
    world.collect(&old[..15], key()).await;
    world.consume(key()).await;
    assert_eq!(world.count(confirmed).await, 15);
    assert_eq!(world.count("select count(*) from workspace_build").await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_accepted_while_the_ends_were_measured_stay_valid() {
    let world = World::new().await;
    let ends = world.ends().await;
    world.collect(&events(0..10), Signatures::default()).await;
    world.consume(Signatures::default()).await;
    world
        .ledger
        .run(async |conn| cutover::begin(conn, &ends, world.ledger.clock.now()).await)
        .await
        .unwrap();
    assert_eq!(world.replay(key()).await, 0);
    assert_eq!(world.count("select count(*) from reject").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_is_of_the_life_that_the_partition_begins() {
    let world = World::new().await;
    let subject = Subject::Named("a test");
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Recover,
        subject,
        reason: "a test",
        detail: serde_json::json!({}),
    };
    let act = world
        .ledger
        .run(async |conn| rejects::begin_acts(conn, &[act], world.ledger.clock.now()).await)
        .await
        .unwrap()[0];
    let topic = Topic::AgentUsage.name();
    let ended = sqlx::query("insert into past_position values ($1, 0, 1, 0, 5, 5, $2)")
        .bind(topic)
        .bind(act);
    ended.execute(&world.ledger.pool).await.unwrap();
    world
        .ledger
        .run(async |conn| cutover::begin(conn, &world.ends().await, world.ledger.clock.now()).await)
        .await
        .unwrap();
    let query =
        "select partition, generation from signature_cutover where topic = $1 order by partition";
    let generations: Vec<(i32, i32)> =
        sqlx::query_as(query).bind(topic).fetch_all(&world.ledger.pool).await.unwrap();
    assert_eq!(generations, [(0, 2), (1, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejected_unsigned_record_leaves_its_id_free_and_is_signed_when_it_is_resubmitted() {
    let world = World::new().await;
    world.consume(key()).await;
    let (first, second) = (usage(DEPLOYMENT, 1), usage(DEPLOYMENT, 2));
    world.produce([forged(&first), forged(&second)]).await;
    world.consume(key()).await;
    let ids: Vec<String> = [&first, &second].map(Event::id).to_vec();
    assert!(
        world
            .ledger
            .run(async |conn| known::refused_ids(conn, DEPLOYMENT, &ids).await)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(
        world
            .ledger
            .run(async |conn| known::refused_states(conn, DEPLOYMENT, &ids).await)
            .await
            .unwrap()
            .is_empty()
    );
    let messages: HashMap<_, _> =
        [&first, &second].map(|event| (event.id(), event.to_message())).into();
    assert!(
        world
            .ledger
            .run(async |conn| known::refused_messages(conn, DEPLOYMENT, &messages).await)
            .await
            .unwrap()
            .is_empty()
    );

    world.collect(std::slice::from_ref(&first), key()).await;
    world.consume(key()).await;
    assert_eq!(
        world.count("select count(*) from usage_event where confirmed_at is not null").await,
        1
    );

    let which =
        WhichRejects { cause: Some(RejectCause::Unsigned.to_string()), ..WhichRejects::default() };
    let rejects = ask(&world.operations(key()), &ListRejects { which, after: 0, limit: 10 })
        .await
        .unwrap()
        .rejects;
    let reject = rejects.iter().find(|reject| reject.event_id == Some(second.id())).unwrap();
    assert!(reject.detail.contains("tallyline-signature"), "{}", reject.detail);
    let request = Resubmit { ids: vec![reject.id], ..Resubmit::default() };
    let unable =
        act(&world.operations(Signatures::default()), &request, &operator()).await.unwrap_err();
    assert!(
        matches!(&unable, OperationError::Forbidden(why) if why.contains("log.signing_key")),
        "{unable}"
    );
    act(&world.operations(key()), &request, &operator()).await.unwrap();
    world.consume(key()).await;
    let accepted = "select count(*) from usage_event where id = 'usage-2' and confirmed_at is null";
    assert_eq!(
        world.count(accepted).await,
        1,
        "an operator passed it on; no collector has confirmed it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_one_site_do_not_verify_at_another_with_the_same_key() {
    let (staging, production) = (World::new().await, World::new().await);
    staging.collect(&events(0..1), key()).await;
    production.consume(key()).await;
    production.produce(staging.records().await).await;
    production.consume(key()).await;
    assert_eq!(production.causes().await, ["bad_signature"]);
    assert_eq!(production.count("select count(*) from reject").await, 3);
    staging.consume(key()).await;
    assert_eq!(staging.count("select count(*) from reject").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_without_keys_reads_no_log_whose_records_must_be_signed() {
    let world = World::new().await;
    world.consume(key()).await;
    world.produce(events(0..3).iter().map(forged)).await;
    let log = world.log(Signatures::default());
    let telemetry =
        tallyline::consumer::ConsumerTelemetry::register(&prometheus::Registry::new()).unwrap();
    let consumer = tallyline::consumer::Consumer::new(log, world.ledger.clone(), GROUP, telemetry);
    let (stop, stopped) = (tokio_util::sync::CancellationToken::new(), consumer.stopped.clone());
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { consumer.run(&stop).await }
    });
    crate::support::eventually(super::world::SOON, "every partition is named", || async {
        let stopped = stopped.lock().unwrap();
        stopped.len() == 6 && stopped.values().all(|why| why.contains("log.verification_keys"))
    })
    .await;
    stop.cancel();
    task.await.unwrap();
    assert_eq!(world.count("select count(*) from batch where records > 0").await, 0);
}
