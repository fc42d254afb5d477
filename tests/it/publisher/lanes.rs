//! Several requests in flight.

use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use tallyline::ledger::{
    Landmark, Pausable, Pause, RestoreEvidence, publications, recoveries, restored,
};
use tallyline::pauses::Paused;
use tallyline::publisher::Condition;
use tallyline_sim::tallyman::{ServerErrors, Switches};

use super::world::{World, no_mark, start_time, usage};
use crate::support::eventually;
use crate::support::ledger::newest_landmark;

const DEADLINE: Duration = Duration::from_secs(60);

/// A vendor that answers after this time.
async fn slow_vendor(latency_ms: u64) -> World {
    World::with(Switches { latency_ms, ..Switches::default() }).await
}

async fn leased(world: &World) -> i64 {
    let query = "select count(*) from publication where leased_by is not null";
    sqlx::query_scalar(query).fetch_one(&world.ledger.pool).await.unwrap()
}

/// Waits until the vendor has this number of unanswered requests.
async fn in_flight(world: &World, number: usize) {
    eventually(DEADLINE, "requests are in flight", || async {
        world.vendor.books().in_flight == number
    })
    .await;
}

#[tokio::test]
async fn up_to_the_set_number_of_requests_are_in_flight_and_never_more() {
    // the vendor takes longer than a loaded machine needs to prepare that many requests
    for (concurrency, latency_ms) in [(1, 50), (3, 800), (8, 3_000)] {
        let mut world = slow_vendor(latency_ms).await;
        world.settings.concurrency = concurrency;
        let ids = world.add_many(1_450).await;
        let cycle = world.cycle().await;
        assert_eq!((cycle.requests, cycle.accepted, cycle.failure), (15, 1_450, None));
        let books = world.vendor.books();
        assert_eq!(books.most_in_flight, concurrency);
        let mut delivered = world.delivered();
        delivered.sort();
        assert_eq!(delivered, ids, "no two requests share an event");
    }
}

#[tokio::test]
async fn each_request_has_a_lease_of_its_own() {
    let world = slow_vendor(60_000).await;
    world.add_many(450).await;
    let mut publisher = world.publisher();
    let leases = async {
        in_flight(&world, 4).await;
        let query =
            "select count(*) from publication join publication_attempt using (source_id, event_id)
                     group by leased_by, request_id order by 1";
        sqlx::query_scalar::<_, i64>(query).fetch_all(&world.ledger.pool).await.unwrap()
    };
    let leases = tokio::select! {
        cycle = publisher.cycle(&world.stop) => panic!("unexpected answer: {cycle:?}"),
        leases = leases => leases,
    };
    assert_eq!(leases, [100; 4]);
}

#[tokio::test]
async fn a_publisher_that_dies_with_4_requests_in_flight_leaves_each_event_once_at_the_vendor() {
    let mut world = slow_vendor(0).await;
    let ids = world.add_many(950).await;
    let direct = world.settings.tallyman.clone();
    world.settings.tallyman =
        tallyline::tallyman::ClientSettings::new(super::requests::one_way(world.vendor.addr).await);
    let mut dying = world.publisher();
    let delivered = eventually(DEADLINE, "the vendor has taken 4 requests", || async {
        world.vendor.books().billed.len() == 400
    });
    tokio::select! {
        cycle = dying.cycle(&world.stop) => panic!("unexpected answer: {cycle:?}"),
        () = delivered => {}
    }
    drop(dying);
    let query = "select count(*) from publication where unanswered";
    let unanswered: i64 = sqlx::query_scalar(query).fetch_one(&world.ledger.pool).await.unwrap();
    assert_eq!(unanswered, 400, "the vendor may have accepted them");

    world.settings.tallyman = direct;
    // the database may still carry out a lease of the dead publisher
    eventually(DEADLINE, "all are published", || async {
        world.end_leases().await;
        world.cycle().await;
        world.number_in("published").await == 950
    })
    .await;
    let books = world.vendor.books();
    assert_eq!(books.billed.len(), ids.len());
    assert!(books.billed.iter().all(|billed| billed.times == 1));
    assert_eq!(world.number_in("published").await, 950);
}

#[tokio::test]
async fn a_stop_lets_all_requests_in_flight_finish_and_releases_the_other_leases() {
    let world = slow_vendor(2_000).await;
    world.add_many(1_000).await;
    let stop = world.stop.child_token();
    let (mut publisher, signal) = (world.publisher(), stop.clone());
    let running = tokio::spawn(async move { publisher.run(no_mark, &signal).await });
    in_flight(&world, 4).await;
    stop.cancel();
    tokio::time::timeout(DEADLINE, running).await.expect("it ends").unwrap();
    assert_eq!((world.number_in("published").await, leased(&world).await), (400, 0));
    assert_eq!(world.vendor.books().requests, 4);
}

#[tokio::test]
async fn a_pause_lets_all_requests_in_flight_finish_and_begins_no_other() {
    let mut world = slow_vendor(2_000).await;
    let (sender, paused) = Paused::channel();
    world.settings.paused = paused;
    world.add_many(1_000).await;
    let mut publisher = world.publisher();
    let pausing = async {
        in_flight(&world, 4).await;
        sender.send_replace(vec![Pause {
            operation: Pausable::Publish,
            topic: None,
            actor: "sre-1".into(),
            reason: "maintenance".into(),
            since: start_time(),
        }]);
    };
    let (cycle, ()) = tokio::join!(publisher.cycle(&world.stop), pausing);
    assert_eq!((cycle.unwrap().accepted, leased(&world).await), (400, 0));
    assert!(matches!(publisher.condition().get(), Condition::Paused(_)));
    assert_eq!(world.vendor.books().requests, 4);
}

#[tokio::test]
async fn a_finding_that_holds_the_source_ends_publishing_before_the_next_request() {
    let world = slow_vendor(2_000).await;
    world.add_many(1_000).await;
    let mut publisher = world.publisher();
    let finding = async {
        in_flight(&world, 4).await;
        sqlx::query(
            "insert into audit_finding (joint, differences, open, examples, incarnation, sequence, audited_at, seconds, differs_since, gone,
                 recent_usage_differs, recent_usage)
             values ('vendor', 1, 0, '[]', gen_random_uuid(), 1, now(), 1, now(), 0, 0, 0)",
        )
        .execute(&world.ledger.pool)
        .await
        .unwrap();
    };
    let (cycle, ()) = tokio::join!(publisher.cycle(&world.stop), finding);
    assert_eq!((cycle.unwrap().accepted, leased(&world).await), (400, 0));
    assert!(matches!(publisher.condition().get(), Condition::Held(_)));
}

#[tokio::test]
async fn a_failed_request_ends_the_cycle_and_the_others_in_flight_are_recorded() {
    for status in [500, 503] {
        let errors = ServerErrors { status, next: 1, ..ServerErrors::default() };
        let world =
            World::with(Switches { latency_ms: 1_000, errors, ..Switches::default() }).await;
        world.add_many(1_000).await;
        let cycle = world.cycle().await;
        assert!(cycle.failure.is_some(), "{cycle:?}");
        assert!((300..1_000).contains(&cycle.accepted), "{cycle:?}");
        let requests = world.vendor.books().requests;
        assert_eq!((cycle.requests as u64, leased(&world).await), (requests, 0));
        let rest = world.cycle().await;
        assert_eq!(cycle.accepted + rest.accepted, 1_000);
    }
}

#[tokio::test]
async fn licenses_and_publish_marks_are_read_once_for_1000_events() {
    let world = World::new().await;
    world.add_many(2_500).await;
    let mut publisher = world.publisher();
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert_eq!((cycle.requests, cycle.accepted), (25, 2_500));
    // a session reports its reads at the latest when it ends
    drop(publisher);
    let reads = async || {
        let query = "select seq_scan + coalesce(idx_scan, 0) from pg_stat_user_tables where relname = 'licenses'";
        sqlx::query_scalar::<_, i64>(query).fetch_one(&world.coderd).await.unwrap()
    };
    eventually(DEADLINE, "the reads are reported", || async { reads().await >= 3 }).await;
    // a round also ends after 5 seconds, which a loaded machine may need
    assert!(reads().await < 10, "{}", reads().await);
}

#[tokio::test]
async fn usage_that_arrives_while_a_request_is_in_flight_does_not_wait_for_its_answer() {
    let mut world = slow_vendor(60_000).await;
    world.settings.poll = Duration::from_millis(50);
    world.add_many(10).await;
    let mut publisher = world.publisher();
    let later = async {
        in_flight(&world, 1).await;
        world.vendor.set_switches(Switches::default()).unwrap();
        world.add(&[usage("later", start_time())]).await;
        eventually(DEADLINE, "the later event is published", || async {
            world.number_in("published").await == 1
        })
        .await;
        assert_eq!(world.vendor.books().in_flight, 1);
    };
    tokio::select! {
        cycle = publisher.cycle(&world.stop) => panic!("unexpected answer: {cycle:?}"),
        () = later => {}
    }
}

#[tokio::test]
async fn a_long_cycle_shows_its_condition_its_verdicts_and_the_queue_before_its_end() {
    let mut world = World::new().await;
    world.settings.concurrency = 1;
    world.add_many(1_450).await;
    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    let condition = publisher.condition();
    let number = |name: &str| {
        let families = registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        family.map_or(0.0, |family| {
            let of = |metric: &prometheus::proto::Metric| {
                metric.get_gauge().value() + metric.get_counter().value()
            };
            family.get_metric().iter().map(of).sum()
        })
    };
    let shown = async {
        eventually(DEADLINE, "the vendor has most of it", || async {
            world.vendor.books().billed.len() >= 1_000
        })
        .await;
        world.vendor.set_switches(Switches { latency_ms: 60_000, ..Switches::default() }).unwrap();
        eventually(DEADLINE, "the cycle shows its work", || async {
            number("tallyline_publisher_verdicts_total") >= 900.0
                && condition.get() == Condition::Working
                && number("tallyline_publisher_pending") < 1_450.0
        })
        .await;
    };
    tokio::select! {
        cycle = publisher.cycle(&world.stop) => panic!("the cycle has ended: {cycle:?}"),
        () = shown => {}
    }
}

#[tokio::test]
async fn due_usage_is_leased_before_held_usage_and_held_usage_by_its_due_time() {
    let world = World::new().await;
    let ids = world.add_many(250).await;
    sqlx::query("delete from usage_events where id = any($1)")
        .bind(&ids[..200])
        .execute(&world.coderd)
        .await
        .unwrap();
    assert_eq!(world.cycle().await.held_back, 200);
    world.pass(TimeDelta::hours(1));
    sqlx::query("update publication set next_attempt_at = next_attempt_at - interval '1 minute' where event_id = any($1)")
        .bind(&ids[100..200])
        .execute(&world.ledger.pool)
        .await
        .unwrap();
    let now = world.clock.now();
    let usages: Vec<_> = (0..60).map(|number| usage(&format!("new-{number:02}"), now)).collect();
    world.add(&usages).await;
    let lease = async |holder: &str, limit, with_held| {
        let (after, length) = (start_time() - TimeDelta::days(30), Duration::from_secs(60));
        let leased = world.ledger.run(async |conn| match with_held {
            true => {
                publications::lease(conn, world.source.id, holder, after, limit, length, now).await
            }
            false => {
                publications::lease_unheld(conn, world.source.id, holder, after, limit, length, now)
                    .await
            }
        });
        leased.await.unwrap().into_iter().map(|event| event.event_id).collect::<Vec<_>>()
    };
    let first = lease("first", 50, true).await;
    assert!(first.len() == 50 && first.iter().all(|id| id.starts_with("new-")), "{first:?}");
    assert_eq!(lease("second", 100, false).await.len(), 10, "without held usage");
    let third = lease("third", 100, true).await;
    assert_eq!(third, ids[100..200], "the earliest due of the held usage");
}

#[tokio::test]
async fn a_recovery_that_opens_between_a_lease_and_its_request_is_the_shown_reason() {
    let mut world = slow_vendor(2_000).await;
    world.settings.concurrency = 1;
    world.add_many(300).await;
    let mut publisher = world.publisher();
    let restore = async {
        in_flight(&world, 1).await;
        let landmark = newest_landmark(&world.ledger).await;
        let gone =
            Landmark { recorded_at: landmark.recorded_at + TimeDelta::seconds(1), ..landmark };
        let evidence = RestoreEvidence::Batch(gone);
        let now = world.clock.now();
        let opened =
            world.ledger.run(async |conn| restored::record_detected(conn, &evidence, now).await);
        assert!(opened.await.unwrap());
        assert!(world.ledger.run(recoveries::open).await.unwrap().is_some());
    };
    let (cycle, ()) = tokio::join!(publisher.cycle(&world.stop), restore);
    assert_eq!(cycle.unwrap().failure, None);
    let condition = publisher.condition().get();
    assert!(matches!(condition, Condition::Recovering(_)), "{condition}");
    assert_eq!(world.vendor.books().requests, 1);
}
