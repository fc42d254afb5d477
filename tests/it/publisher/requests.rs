//! Requests that fail, are cut, or whose sender dies: nothing is lost, nothing is billed twice.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use tallyline::ledger::{
    Attempt, AttemptVerdict, NewRequest, RequestOutcome, Settlement, books, publication_requests,
    publications, snapshots,
};
use tallyline::publisher::Condition;
use tallyline::tallyman::{ClientSettings, SendError};
use tallyline_sim::tallyman::{CutMoment, Cuts, ServerErrors, Switches};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use super::world::{DEPLOYMENT, World, no_mark, start_time, usage};
use crate::support::eventually;

const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_fault_of_the_vendor_fails_the_request_and_the_next_one_carries_the_same_events() {
    for after_accepting in [false, true] {
        let errors =
            ServerErrors { status: 503, next: 1, after_accepting, ..ServerErrors::default() };
        let world = World::with(Switches { errors, ..Switches::default() }).await;
        world.add(&["a", "b"].map(|id| usage(id, start_time()))).await;
        let failed = world.cycle().await;
        assert!(
            matches!(failed.failure, Some(SendError::Status { status: 503, .. })),
            "{failed:?}"
        );
        assert!(
            world
                .state("a")
                .await
                .1
                .is_some_and(|message| message.contains("unexpected status code 503"))
        );
        let pending = world
            .ledger
            .run(async |conn| publications::pending(conn, world.source.id).await)
            .await
            .unwrap();
        assert_eq!(
            (pending.events, pending.unanswered),
            (2, 2),
            "a gateway may have failed after the vendor took them"
        );
        assert_eq!(world.cycle().await.accepted, 2);
        assert_eq!(["a", "b"].map(|id| world.times_billed(id)), [1, 1]);
        let unanswered: i64 =
            sqlx::query_scalar("select count(*) from publication where unanswered")
                .fetch_one(&world.ledger.pool)
                .await
                .unwrap();
        assert_eq!(unanswered, 0);
    }
}

#[tokio::test]
async fn an_event_whose_answer_was_cut_off_is_delivered_again_byte_for_byte_and_billed_once() {
    let cuts = Cuts { moment: CutMoment::AfterAccepting, next: 1, fraction: 0.0 };
    let world = World::with(Switches { cuts, ..Switches::default() }).await;
    world.add(&[usage("a", start_time() + TimeDelta::microseconds(120))]).await;
    let cycle = world.cycle().await;
    assert!(matches!(cycle.failure, Some(SendError::Unanswered(_))), "{cycle:?}");
    let request: (Option<chrono::DateTime<Utc>>, Option<i32>, Option<String>) =
        sqlx::query_as("select answered_at, status, error from publication_request")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
    assert!(request.0.is_none() && request.1.is_none() && request.2.is_some(), "{request:?}");
    world.pass(TimeDelta::days(10));
    assert_eq!(world.cycle().await.accepted, 1);
    let books = world.vendor.books();
    let texts = books.texts(DEPLOYMENT, "a");
    assert_eq!(texts.len(), 2);
    assert_eq!(texts[0], texts[1]);
    assert_eq!(world.times_billed("a"), 1);
}

#[tokio::test]
async fn without_a_vendor_nothing_counts_as_sent() {
    let mut world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    world.settings.tallyman = ClientSettings::new(closed);
    world.add(&[usage("a", start_time())]).await;
    let cycle = world.cycle().await;
    assert!(matches!(cycle.failure, Some(SendError::Unreachable(_))), "{cycle:?}");
    world.pass(TimeDelta::days(30));
    assert_eq!(
        world.cycle().await.settled.expired,
        1,
        "expired, not unknown: no attempt can have been taken"
    );
}

/// Forwards everything to the vendor, and no answer back.
pub async fn one_way(vendor: std::net::SocketAddr) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/api/v1/events/ingest", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let mut to = TcpStream::connect(vendor).await.unwrap();
            tokio::spawn(async move {
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    url
}

#[tokio::test]
async fn a_publisher_that_dies_between_sending_and_the_answer_leaves_its_events_to_the_next_after_its_lease()
 {
    let mut world = World::new().await;
    let direct = world.settings.tallyman.clone();
    world.settings.tallyman = ClientSettings::new(one_way(world.vendor.addr).await);
    world.add(&["a", "b"].map(|id| usage(id, start_time()))).await;
    let mut dying = world.publisher();
    let delivered = eventually(DEADLINE, "the vendor has taken them", || async {
        world.vendor.books().billed.len() == 2
    });
    tokio::select! {
        cycle = dying.cycle(&world.stop) => panic!("unexpected answer: {cycle:?}"),
        () = delivered => {}
    }
    drop(dying);

    world.settings.tallyman = direct;
    assert_eq!(world.cycle().await.requests, 0, "the lease lasts");
    assert_eq!(
        world
            .ledger
            .run(async |conn| publications::pending(conn, world.source.id).await)
            .await
            .unwrap()
            .unanswered,
        2
    );
    world.end_leases().await;
    assert_eq!(world.cycle().await.accepted, 2);
    assert_eq!(["a", "b"].map(|id| world.times_billed(id)), [1, 1]);
    for id in ["a", "b"] {
        let books = world.vendor.books();
        let texts: BTreeSet<&str> = books.texts(DEPLOYMENT, id).into_iter().collect();
        assert_eq!((books.texts(DEPLOYMENT, id).len(), texts.len()), (2, 1));
    }
    let open: i64 =
        sqlx::query_scalar("select count(*) from publication_request where batch_id is null")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(open, 1, "the unfinished request stays visible");
}

#[tokio::test]
async fn publishers_beside_each_other_never_send_the_same_event() {
    let world = World::with(Switches { latency_ms: 20, ..Switches::default() }).await;
    let ids = world.add_many(700).await;
    let (mut one, mut two, mut three) = (world.publisher(), world.publisher(), world.publisher());
    let cycles =
        tokio::join!(one.cycle(&world.stop), two.cycle(&world.stop), three.cycle(&world.stop));
    let cycles = [cycles.0.unwrap(), cycles.1.unwrap(), cycles.2.unwrap()];
    assert_eq!(cycles.iter().map(|cycle| cycle.accepted).sum::<usize>(), 700);
    assert!(
        cycles.iter().filter(|cycle| cycle.requests > 0).count() > 1,
        "they did work beside each other: {cycles:?}"
    );
    let mut delivered = world.delivered();
    delivered.sort();
    assert_eq!(delivered, ids);
    assert_eq!(world.number_in("published").await, 700);
}

#[tokio::test]
async fn a_request_is_not_sent_once_a_lease_is_lost_and_a_late_answer_still_counts() {
    let world = World::new().await;
    world.add(&[usage("a", start_time() - TimeDelta::days(29))]).await;
    let (source_id, lease) = (world.source.id, Duration::from_secs(90));
    let after = start_time() - TimeDelta::days(30);
    let leased = world
        .ledger
        .run(async |conn| {
            publications::lease(
                conn,
                source_id,
                "first",
                after,
                10,
                lease,
                world.ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    assert_eq!(leased.len(), 1);
    assert!(
        world
            .ledger
            .run(async |conn| publications::lease(
                conn,
                source_id,
                "second",
                after,
                10,
                lease,
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
            .is_empty()
    );
    let request = |id, holder| NewRequest {
        id,
        source_id,
        license_sha256: [1; 32],
        event_ids: vec!["a"],
        holder,
        lease,
    };
    let late = Uuid::from_u128(1);
    assert!(
        !world
            .ledger
            .run(async |conn| publication_requests::begin(
                conn,
                &request(Uuid::from_u128(9), "second"),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    assert!(
        world
            .ledger
            .run(async |conn| publication_requests::begin(
                conn,
                &request(late, "first"),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );

    // an attempt is in flight: the event is not settled during the lease
    world.pass(TimeDelta::days(2));
    let too_old = || {
        world.ledger.run(async |conn| {
            publications::settle(
                conn,
                source_id,
                "second",
                std::slice::from_ref(&leased[0].event_id),
                Settlement::TooOld,
                world.ledger.clock.now(),
            )
            .await
        })
    };
    assert_eq!(too_old().await.unwrap().unknown, 0);
    world.end_leases().await;
    assert!(
        !world
            .ledger
            .run(async |conn| publication_requests::begin(
                conn,
                &request(Uuid::from_u128(8), "first"),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap(),
        "its lease is over"
    );
    assert_eq!(too_old().await.unwrap().unknown, 1);

    let attempt = Attempt {
        event_id: "a".to_owned(),
        verdict: AttemptVerdict::Accepted,
        message: None,
        next_attempt_at: world.clock.now(),
        unanswered: false,
        held_for: None,
    };
    let outcome = RequestOutcome {
        id: late,
        source_id,
        holder: "first",
        answered_at: Some(world.clock.now()),
        status: Some(200),
        error: None,
        attempts: vec![attempt],
        lease: None,
    };
    world
        .ledger
        .run(async |conn| {
            publication_requests::record_outcome(conn, &outcome, world.ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(world.state("a").await.0, "published");
    let batches = || async { world.ledger.run(snapshots::head).await.unwrap().number };
    let before = batches().await;
    world
        .ledger
        .run(async |conn| {
            publication_requests::record_outcome(conn, &outcome, world.ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(batches().await, before, "recorded once");
}

#[tokio::test]
async fn a_late_verdict_takes_precedence_over_coderds_mark() {
    let world = World::new().await;
    let (source_id, lease, id) = (world.source.id, Duration::from_secs(90), Uuid::from_u128(1));
    world.add(&["a", "b"].map(|id| usage(id, start_time()))).await;
    world
        .ledger
        .run(async |conn| {
            publications::lease(
                conn,
                source_id,
                "frozen",
                start_time() - TimeDelta::days(30),
                10,
                lease,
                world.ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    let event_ids = vec!["a", "b"];
    assert!(
        world
            .ledger
            .run(async |conn| publication_requests::begin(
                conn,
                &NewRequest {
                    id,
                    source_id,
                    license_sha256: [1; 32],
                    event_ids,
                    holder: "frozen",
                    lease
                },
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    world.end_leases().await;
    let ids = ["a", "b"].map(str::to_owned);
    assert_eq!(
        world
            .ledger
            .run(async |conn| publications::settle(
                conn,
                source_id,
                "other",
                &ids,
                Settlement::NotOurs,
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
            .not_ours,
        2
    );

    let attempts =
        [("a", AttemptVerdict::Accepted), ("b", AttemptVerdict::Refused)].map(|(id, verdict)| {
            Attempt {
                event_id: id.to_owned(),
                verdict,
                message: None,
                next_attempt_at: world.clock.now(),
                unanswered: false,
                held_for: None,
            }
        });
    let answered_at = Some(world.clock.now());
    let attempts = attempts.to_vec();
    let outcome = RequestOutcome {
        id,
        source_id,
        holder: "frozen",
        answered_at,
        status: Some(200),
        error: None,
        attempts,
        lease: None,
    };
    world
        .ledger
        .run(async |conn| {
            publication_requests::record_outcome(conn, &outcome, world.ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(world.states(&["a", "b"]).await, ["published", "refused"]);
    let differences = world.ledger.run(books::add_up).await.unwrap().differences;
    assert!(
        differences.iter().all(|difference| difference.kind != "publication_without_its_answer"),
        "{differences:?}"
    );
}

#[tokio::test]
async fn a_stop_lets_the_request_in_flight_finish() {
    let mut world = World::with(Switches { latency_ms: 300, ..Switches::default() }).await;
    world.settings.concurrency = 1;
    world.add_many(150).await;
    let stop = world.stop.child_token();
    let (mut publisher, signal) = (world.publisher(), stop.clone());
    let condition = publisher.condition();
    let running = tokio::spawn(async move { publisher.run(no_mark, &signal).await });
    eventually(DEADLINE, "a request is under way", || async {
        sqlx::query_scalar("select count(*) = 1 from publication_request")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap()
    })
    .await;
    stop.cancel();
    tokio::time::timeout(DEADLINE, running).await.expect("it ends").unwrap();
    assert_eq!((world.number_in("published").await, world.number_in("pending").await), (100, 50));
    let leased: i64 =
        sqlx::query_scalar("select count(*) from publication where leased_by is not null")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(leased, 0);
    assert!(condition.get().is_healthy());
}

#[tokio::test]
async fn a_running_publisher_outlasts_faults() {
    let errors = ServerErrors { next: 2, ..ServerErrors::default() };
    let mut world = World::with(Switches { errors, ..Switches::default() }).await;
    (world.settings.first_wait, world.settings.longest_wait) =
        (Duration::from_millis(10), Duration::from_millis(50));
    world.settings.poll = Duration::from_millis(20);
    world.add(&[usage("a", start_time())]).await;
    let stop = world.stop.child_token();
    let (mut publisher, signal) = (world.publisher(), stop.clone());
    let condition = publisher.condition();
    let running = tokio::spawn(async move { publisher.run(no_mark, &signal).await });
    eventually(DEADLINE, "the event is published", || async {
        world.number_in("published").await == 1
    })
    .await;
    world.add(&[usage("b", start_time())]).await;
    eventually(DEADLINE, "later events are published too", || async {
        world.number_in("published").await == 2
    })
    .await;
    eventually(DEADLINE, "the publisher works again", || async {
        condition.get() == Condition::Working
    })
    .await;
    stop.cancel();
    tokio::time::timeout(DEADLINE, running).await.expect("it ends").unwrap();
    assert_eq!(world.vendor.books().requests, 4);
}

#[tokio::test]
async fn a_delayed_process_sends_nothing_once_its_lease_could_end_too_early() {
    let mut world = World::new().await;
    // to write the request down takes longer than the lease has left beyond the request's timeout
    world.settings.lease = world.settings.tallyman.request_timeout + Duration::from_nanos(1);
    world.add(&[usage("a", start_time())]).await;
    let cycle = world.cycle().await;
    assert!(
        matches!(&cycle.failure, Some(SendError::Unreachable(why)) if why.contains("was delayed")),
        "{cycle:?}"
    );
    assert_eq!(world.vendor.books().requests, 0);
    assert_eq!(
        world
            .ledger
            .run(async |conn| publications::pending(conn, world.source.id).await)
            .await
            .unwrap()
            .unanswered,
        0
    );
}

#[tokio::test]
async fn leases_are_released_in_the_lock_order_of_the_ids() {
    let world = World::new().await;
    let ids: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
    world.add(&["c", "b", "a"].map(|id| usage(id, start_time()))).await;
    let leased = world
        .ledger
        .run(async |conn| {
            publications::lease(
                conn,
                world.source.id,
                "one",
                start_time() - TimeDelta::days(30),
                10,
                DEADLINE,
                world.ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    assert_eq!(leased.len(), 3);
    // the first id's row is last in the table: a scan without the index would find the others first
    for statement in [
        "update publication set last_message = repeat('x', 9000) where event_id = 'a'",
        "do $$ begin
             execute format('alter database %I set enable_indexscan = off', current_database());
             execute format('alter database %I set enable_bitmapscan = off', current_database());
         end $$",
    ] {
        sqlx::query(statement).execute(&world.ledger.pool).await.unwrap();
    }
    let ledger = world.ledger_again();
    let lock = |id: &'static str| {
        sqlx::query("select from publication where event_id = $1 for update nowait").bind(id)
    };
    let mut other = world.ledger.pool.begin().await.unwrap();
    lock("a").execute(&mut *other).await.unwrap();
    let backwards: Vec<String> = ids.iter().rev().cloned().collect();
    let released = ledger
        .run(async |conn| publications::release(conn, world.source.id, "one", &backwards).await);
    let beside = async {
        eventually(DEADLINE, "it waits for the first", || async {
            let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
            sqlx::query_scalar::<_, i64>(waiting).fetch_one(&world.ledger.pool).await.unwrap() == 1
        })
        .await;
        for id in ["b", "c"] {
            lock(id).execute(&mut *other).await.expect("it holds no later one");
        }
        other.commit().await.unwrap();
    };
    let (released, ()) = tokio::join!(released, beside);
    released.unwrap();
    let remaining: i64 =
        sqlx::query_scalar("select count(*) from publication where leased_by is not null")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(remaining, 0);
}
