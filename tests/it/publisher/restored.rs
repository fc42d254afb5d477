//! A publisher and a restored ledger: before the restore is known, and in the middle of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use tallyline::ledger::{
    ActKind, Attempt, AttemptVerdict, NewAct, NewRequest, Recorded, RequestOutcome,
    RestoreEvidence, Subject, publication_requests, publications, restored, snapshots,
};
use tallyline::publisher::Condition;
use tallyline_sim::tallyman::Switches;
use uuid::Uuid;

use super::world::{World, start_time, usage};
use crate::support::eventually;

const DEADLINE: Duration = Duration::from_secs(30);

fn gauge(registry: &Registry, name: &str) -> f64 {
    let families = registry.gather();
    families
        .iter()
        .find(|family| family.name() == name)
        .map_or(0.0, |family| family.get_metric()[0].get_gauge().value())
}

fn accepted(registry: &Registry) -> f64 {
    let families = registry.gather();
    let Some(family) =
        families.iter().find(|family| family.name() == "tallyline_publisher_verdicts_total")
    else {
        return 0.0;
    };
    let of = |metric: &&prometheus::proto::Metric| {
        metric.get_label().iter().any(|label| label.value() == "accepted")
    };
    family.get_metric().iter().find(of).map_or(0.0, |metric| metric.get_counter().value())
}

#[tokio::test]
async fn nothing_is_sent_or_settled_before_it_is_known_whether_the_ledger_was_restored() {
    for went_back in [false, true] {
        let mut world = World::new().await;
        world.settings.poll = Duration::from_millis(20);
        world
            .add(&[usage("old", start_time() - TimeDelta::days(31)), usage("due", start_time())])
            .await;
        let registry = Registry::new();
        let mut publisher = world.publisher_in(&registry);
        let (condition, stop) = (publisher.condition(), world.stop.child_token());
        let answers = Arc::new(AtomicBool::new(false));
        let (log, signal) = (Arc::clone(&answers), stop.clone());
        let compare_marks = move || {
            let answer = if log.load(Ordering::SeqCst) {
                Ok(())
            } else {
                Err(anyhow::anyhow!("the log does not answer"))
            };
            std::future::ready(answer)
        };
        let running = tokio::spawn(async move { publisher.run(compare_marks, &signal).await });
        // it still shows the backlog, and does nothing about it
        for (number, id) in [(2.0, "a"), (3.0, "b"), (4.0, "c")] {
            eventually(DEADLINE, "the backlog is shown", || async {
                gauge(&registry, "tallyline_publisher_pending") == number
            })
            .await;
            world.add(&[usage(id, start_time())]).await;
        }
        assert!(
            matches!(condition.get(), Condition::Failing(why) if why.contains("the log does not answer"))
        );
        assert_eq!((world.number_in("pending").await, world.vendor.books().requests), (5, 0));
        let requests: i64 = sqlx::query_scalar("select count(*) from publication_request")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
        assert_eq!(requests, 0);

        if went_back {
            let restored = RestoreEvidence::Reported {
                incarnation: world.ledger.run(snapshots::head).await.unwrap().incarnation,
                without: Vec::new(),
                marked: Vec::new(),
            };
            let act = NewAct {
                actor: "user-001",
                act: ActKind::Recover,
                subject: Subject::Named("ledger"),
                reason: "",
                detail: serde_json::json!({}),
            };
            assert!(
                world
                    .ledger
                    .run(async |conn| restored::record(
                        conn,
                        &restored,
                        &act,
                        None,
                        world.ledger.clock.now()
                    )
                    .await)
                    .await
                    .unwrap()
            );
        }
        answers.store(true, Ordering::SeqCst);
        if went_back {
            eventually(DEADLINE, "the usage is held", || async {
                matches!(condition.get(), Condition::Recovering(_))
            })
            .await;
            assert_eq!((world.number_in("pending").await, world.vendor.books().requests), (5, 0));
        } else {
            eventually(DEADLINE, "the event is published", || async {
                world.number_in("published").await == 4
            })
            .await;
            assert_eq!(world.state("old").await.0, "expired");
        }
        stop.cancel();
        tokio::time::timeout(DEADLINE, running).await.expect("it ends").unwrap();
    }
}

/// Like a backup from before the request was written down.
async fn restore_to_before_the_request(world: &World) {
    for statement in [
        "delete from publication_attempt",
        "delete from publication_request",
        "update publication set attempts = 0, unanswered = false, leased_by = null, leased_until = null",
    ] {
        sqlx::query(statement).execute(&world.ledger.pool).await.unwrap();
    }
}

#[tokio::test]
async fn an_answer_to_a_lost_request_is_reported_as_lost_and_counts_once() {
    let mut world = World::with(Switches { latency_ms: 500, ..Switches::default() }).await;
    // no other lane sends them again in the same cycle
    world.settings.poll = Duration::from_secs(60);
    world.add(&[usage("a", start_time()), usage("b", start_time())]).await;
    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    let requests = || async {
        let ids = sqlx::query_scalar::<_, Uuid>("select id from publication_request")
            .fetch_all(&world.ledger.pool);
        ids.await.unwrap()
    };
    let restoring = async {
        eventually(DEADLINE, "a request is in flight", || async { requests().await.len() == 1 })
            .await;
        let lost = requests().await[0].to_string();
        restore_to_before_the_request(&world).await;
        lost
    };
    let (cycle, request) = tokio::join!(publisher.cycle(&world.stop), restoring);
    let fault = format!("{:#}", cycle.expect_err("the answer cannot be recorded"));
    assert!(fault.contains(&request) && fault.contains("is missing in the ledger"), "{fault}");
    assert!(
        matches!(publisher.condition().get(), Condition::Failing(why) if why.contains(&request))
    );
    assert_eq!((world.number_in("pending").await, accepted(&registry)), (2, 0.0));
    assert_eq!(["a", "b"].map(|id| world.times_billed(id)), [1, 1], "the vendor took them");

    // the ledger catches up, and they are sent again: the vendor knows their ids
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 2);
    assert_eq!((world.number_in("published").await, accepted(&registry)), (2, 2.0));
    assert_eq!(["a", "b"].map(|id| world.times_billed(id)), [1, 1]);
}

#[tokio::test]
async fn the_outcome_of_a_request_is_recorded_once_and_a_lost_request_is_distinguished() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    let (source_id, lease) = (world.source.id, Duration::from_secs(90));
    let leased = || {
        world.ledger.run(async |conn| {
            publications::lease(
                conn,
                source_id,
                "one",
                start_time() - TimeDelta::days(30),
                10,
                lease,
                world.ledger.clock.now(),
            )
            .await
        })
    };
    let request = |id| NewRequest {
        id,
        source_id,
        license_sha256: [1; 32],
        event_ids: vec!["a"],
        holder: "one",
        lease,
    };
    let attempt = Attempt {
        event_id: "a".to_owned(),
        verdict: AttemptVerdict::Accepted,
        message: None,
        next_attempt_at: start_time(),
        unanswered: false,
        held_for: None,
    };
    let outcome = |id| RequestOutcome {
        id,
        source_id,
        holder: "one",
        answered_at: Some(start_time()),
        status: Some(200),
        error: None,
        attempts: vec![attempt.clone()],
        lease: None,
    };
    let [lost, known] = [Uuid::from_u128(1), Uuid::from_u128(2)];
    assert_eq!(leased().await.unwrap().len(), 1);
    assert!(
        world
            .ledger
            .run(async |conn| publication_requests::begin(
                conn,
                &request(lost),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    restore_to_before_the_request(&world).await;
    let before = world.ledger.run(snapshots::head).await.unwrap().number;
    assert_eq!(
        world
            .ledger
            .run(async |conn| publication_requests::record_outcome(
                conn,
                &outcome(lost),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap(),
        Recorded::RequestLost
    );
    assert_eq!(
        (
            world.state("a").await.0.as_str(),
            world.ledger.run(snapshots::head).await.unwrap().number
        ),
        ("pending", before)
    );
    assert_eq!(leased().await.unwrap().len(), 1);
    assert!(
        world
            .ledger
            .run(async |conn| publication_requests::begin(
                conn,
                &request(known),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    assert_eq!(
        world
            .ledger
            .run(async |conn| publication_requests::record_outcome(
                conn,
                &outcome(known),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap(),
        Recorded::Now
    );
    assert_eq!(
        world
            .ledger
            .run(async |conn| publication_requests::record_outcome(
                conn,
                &outcome(known),
                world.ledger.clock.now()
            )
            .await)
            .await
            .unwrap(),
        Recorded::Before
    );
    assert_eq!(
        (
            world.state("a").await.0.as_str(),
            world.ledger.run(snapshots::head).await.unwrap().number
        ),
        ("published", before + 1)
    );
}
