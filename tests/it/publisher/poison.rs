//! The vendor refuses whole requests: for one event in them, or for another reason.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::ledger::HeldFor;
use tallyline::publisher::Condition;
use tallyline::status;
use tallyline::tallyman::SendError;
use tallyline_sim::tallyman::{Poison, Switches};

use super::books::DEADLINE;
use super::world::{World, no_mark, start_time, usage};
use crate::support::eventually;

async fn poisoned(status: u16, ids: &[&str]) -> World {
    let ids = ids.iter().map(|id| (*id).to_owned()).collect();
    World::with(Switches { poison: Poison { status, ids }, ..Switches::default() }).await
}

async fn due(world: &World, id: &str) -> DateTime<Utc> {
    let query = "select next_attempt_at from publication where event_id = $1";
    sqlx::query_scalar(query).bind(id).fetch_one(&world.ledger.pool).await.unwrap()
}

#[tokio::test]
async fn an_event_that_the_vendor_refuses_with_its_whole_request_lets_all_others_through() {
    for status in [400, 413, 422] {
        let world = poisoned(status, &["event-0123"]).await;
        world.add_many(450).await;
        let mut publisher = world.publisher();
        let cycle = publisher.cycle(&world.stop).await.unwrap();
        assert_eq!((cycle.accepted, cycle.refused_for_now, cycle.failure), (449, 1, None));
        assert_eq!(publisher.condition().get(), Condition::Working);
        assert_eq!(world.held_for("event-0123").await, Some(HeldFor::VendorRefuses));
        let (state, message) = world.state("event-0123").await;
        assert_eq!(state, "pending");
        assert!(message.is_some_and(|message| message.contains(&status.to_string())));
        assert_eq!(world.times_billed("event-0123"), 0);
        // 5 requests, and two for each of the 7 halvings of one of them
        assert!(world.vendor.books().requests <= 5 + 14, "{}", world.vendor.books().requests);
        let query = "select count(*) from publication_request where batch_id is not null";
        let recorded: i64 = sqlx::query_scalar(query).fetch_one(&world.ledger.pool).await.unwrap();
        assert_eq!(
            u64::try_from(recorded),
            Ok(world.vendor.books().requests),
            "each half is a recorded request"
        );
    }
}

#[tokio::test]
async fn a_poisoned_event_is_named_in_status_and_waits_longer_each_time() {
    let world = poisoned(422, &["event-0001"]).await;
    let log = world.log().await;
    world.add_many(3).await;
    world.cycle().await;
    let holds = status::read(&world.ledger, &log, DEADLINE).await.unwrap().holds;
    let [hold] = holds.as_slice() else { panic!("{holds:?}") };
    assert_eq!(hold.event_id.as_deref(), Some("event-0001"));
    assert!(hold.why.contains("422") && hold.ends.contains("expires"), "{hold:?}");
    for refusals in 1..4 {
        let now = due(&world, "event-0001").await;
        world.clock.set(now);
        let more = world.cycle().await;
        assert_eq!((more.requests, more.refused_for_now, more.failure), (1, 1, None));
        let wait = (due(&world, "event-0001").await - now).as_seconds_f64();
        let middle = f64::from(60 << refusals);
        assert!((middle / 2.0..=middle * 1.5).contains(&wait), "{refusals}: {wait}");
    }
    let unanswered: i64 = sqlx::query_scalar("select count(*) from publication where unanswered")
        .fetch_one(&world.ledger.pool)
        .await
        .unwrap();
    assert_eq!(unanswered, 0, "a refused request was not taken");

    world.vendor.set_switches(Switches::default()).unwrap();
    world.clock.set(due(&world, "event-0001").await);
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!(world.held_for("event-0001").await, None);
}

#[tokio::test]
async fn after_a_refused_request_the_next_ones_are_full_again_and_the_poisoned_event_is_retried_alone()
 {
    let world = poisoned(400, &["event-0000"]).await;
    world.add_many(100).await;
    assert_eq!(world.cycle().await.accepted, 99);
    world.pass(TimeDelta::hours(1));
    let before = world.vendor.books().requests;
    let now = world.clock.now();
    let usages: Vec<_> = (0..200).map(|number| usage(&format!("more-{number}"), now)).collect();
    world.add(&usages).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.refused_for_now, cycle.failure), (200, 1, None));
    // two full requests, and the poisoned event
    assert_eq!(world.vendor.books().requests - before, 3);
}

#[tokio::test]
async fn a_vendor_that_refuses_every_request_makes_the_source_wait() {
    let all: Vec<String> = (0..300).map(|number| format!("event-{number:04}")).collect();
    let mut world =
        World::with(Switches { poison: Poison { status: 400, ids: all }, ..Switches::default() })
            .await;
    world.settings.concurrency = 1;
    world.add_many(300).await;
    let mut publisher = world.publisher();
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert!(matches!(cycle.failure, Some(SendError::Status { status: 400, .. })), "{cycle:?}");
    assert!(matches!(publisher.condition().get(), Condition::Failing(why) if why.contains("400")));
    assert!(cycle.accepted == 0 && (100..=300).contains(&cycle.refused_for_now), "{cycle:?}");

    world.vendor.set_switches(Switches::default()).unwrap();
    assert_eq!(world.cycle().await.accepted, 300 - cycle.refused_for_now);
    world.pass(TimeDelta::minutes(2));
    let rest = world.cycle().await;
    assert_eq!(rest.accepted, cycle.refused_for_now);
    assert_eq!(rest.requests, cycle.refused_for_now.div_ceil(100), "full requests again");
}

#[tokio::test]
async fn other_statuses_make_the_source_wait_and_halve_nothing() {
    for status in [401, 404, 429] {
        let world = poisoned(status, &["event-0000"]).await;
        world.add_many(50).await;
        let cycle = world.cycle().await;
        assert!(
            matches!(cycle.failure, Some(SendError::Status { status: found, .. }) if found == status),
            "{cycle:?}"
        );
        assert_eq!((cycle.requests, world.vendor.books().requests), (1, 1));
        assert_eq!(world.held_for("event-0000").await, None);
    }
}

/// 300 events that the vendor refuses: a lease for each lane of one request in flight.
fn oldest_300() -> Vec<String> {
    (0..300).map(|number| format!("event-{number:04}")).collect()
}

async fn poisoned_300() -> World {
    let poison = Poison { status: 422, ids: oldest_300() };
    let mut world = World::with(Switches { poison, ..Switches::default() }).await;
    world.settings.concurrency = 1;
    world
}

#[tokio::test]
async fn usage_later_than_a_lease_of_refused_events_for_each_lane_is_published_in_the_same_cycle() {
    let world = poisoned_300().await;
    world.add_many(350).await;
    let mut publisher = world.publisher();
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert_eq!((cycle.accepted, cycle.refused_for_now, cycle.failure), (50, 300, None));
    assert_eq!(publisher.condition().get(), Condition::Working);
    let query = "select count(*) from publication_attempt join publication_request request on request.id = request_id
         where verdict = 'refused_for_now' and batch_id < (
             select min(batch_id) from publication_attempt join publication_request request on request.id = request_id
             where verdict = 'accepted')";
    let refused_before: i64 =
        sqlx::query_scalar(query).fetch_one(&world.ledger.pool).await.unwrap();
    // with one request in flight the lanes take turns: if each halved its lease, the three ended
    // their 300 events at nearly the same time
    assert!(refused_before < 200, "it did not wait for the halves: {refused_before}");
}

#[tokio::test]
async fn refused_events_do_not_lengthen_the_waits_of_their_source() {
    let mut world = poisoned_300().await;
    world.settings.poll = Duration::from_millis(50);
    (world.settings.first_wait, world.settings.longest_wait) =
        (Duration::from_secs(3_600), Duration::from_secs(3_600));
    world.add_many(2).await;
    let stop = world.stop.child_token();
    let (mut publisher, signal) = (world.publisher(), stop.clone());
    let running = tokio::spawn(async move { publisher.run(no_mark, &signal).await });
    eventually(DEADLINE, "both are held", || async {
        let query =
            "select count(*) from publication where held_for = 'vendor_refuses' and refusals > 0";
        sqlx::query_scalar::<_, i64>(query).fetch_one(&world.ledger.pool).await.unwrap() == 2
    })
    .await;
    world.add(&[usage("good", start_time())]).await;
    eventually(DEADLINE, "the later event is published", || async {
        world.number_in("published").await == 1
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_publish_mark_of_coderd_stops_a_request_that_is_being_halved() {
    let world = poisoned_300().await;
    world.add_many(300).await;
    let mut publisher = world.publisher();
    let mark = async {
        eventually(DEADLINE, "the halves are sent", || async {
            world.vendor.books().requests >= 5
        })
        .await;
        world.coderd_marks("event-0299", Some(start_time()), None).await;
    };
    let (cycle, ()) = tokio::join!(publisher.cycle(&world.stop), mark);
    let cycle = cycle.unwrap();
    assert!(cycle.refused_for_now < 300, "{cycle:?}");
    assert!(matches!(publisher.condition().get(), Condition::Stopped(_)));
    let leased: i64 =
        sqlx::query_scalar("select count(*) from publication where leased_by is not null")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(leased, 0);
}
