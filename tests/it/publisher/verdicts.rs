//! The vendor's verdicts and their effects.

use std::collections::BTreeSet;
use tallyline::ledger::publications;

use chrono::{DateTime, TimeDelta, Utc};
use prometheus::Registry;
use sha2::{Digest as _, Sha256};
use sqlx::Row as _;
use tallyline::publisher::Condition;
use tallyline::tallyman::{LEFT_OUT_MESSAGE, SendError};
use tallyline_sim::tallyman::{Behaviour, EventRule, Switches};

use super::world::{World, first_license, license, start_time, usage};

fn rule(behaviour: Behaviour, id: &str, times: u32) -> EventRule {
    EventRule {
        behaviour,
        ids: vec![id.to_owned()],
        fraction: 0.0,
        until: None,
        times: Some(times),
    }
}

fn rules(events: Vec<EventRule>) -> Switches {
    Switches { events, ..Switches::default() }
}

#[tokio::test]
async fn accepted_events_are_published_in_the_order_of_their_time_by_a_recorded_request() {
    let world = World::new().await;
    let at = |minutes| start_time() - TimeDelta::minutes(minutes);
    world.add(&[usage("late", at(1)), usage("early", at(3)), usage("middle", at(2))]).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.requests, cycle.accepted), (1, 3));
    assert_eq!(world.delivered(), ["early", "middle", "late"]);
    assert_eq!(world.states(&["early", "middle", "late"]).await, ["published"; 3]);

    let request = sqlx::query(
        "select r.events, r.sent_at, r.answered_at, r.status, r.license_sha256,
             (select count(*) from publication p join settlement s using (source_id, event_id) join publication_attempt a using (source_id, event_id)
              where a.request_id = r.id and a.verdict = 'accepted' and s.batch_id = b.id and s.state = 'published' and not p.unanswered and p.attempts = 1)
         from publication_request r join batch b on b.id = r.batch_id and b.kind = 'verdicts' and b.sequence is not null where r.error is null",
    )
    .fetch_one(&world.ledger.pool)
    .await
    .unwrap();
    assert_eq!((request.get::<i32, _>(0), request.get::<i32, _>(3)), (3, 200));
    assert_eq!([1, 2].map(|column| request.get::<DateTime<Utc>, _>(column)), [start_time(); 2]);
    assert_eq!(request.get::<Vec<u8>, _>(4), Sha256::digest(first_license()).to_vec());
    assert_eq!(request.get::<i64, _>(5), 3, "each event names the batch that settled it");

    assert_eq!(world.cycle().await.requests, 0, "nothing is sent twice");
}

#[tokio::test]
async fn each_verdict_is_kept_and_only_retryable_events_are_sent_again() {
    let world = World::with(rules(vec![
        rule(Behaviour::RefuseForNow, "later", 1),
        rule(Behaviour::RefuseForEver, "never", 9),
        rule(Behaviour::Omit, "omitted", 1),
    ]))
    .await;
    world.add(&["good", "later", "never", "omitted"].map(|id| usage(id, start_time()))).await;
    let cycle = world.cycle().await;
    assert_eq!(
        (cycle.accepted, cycle.refused, cycle.refused_for_now, cycle.left_out),
        (1, 1, 1, 1)
    );
    assert_eq!(
        world.states(&["good", "later", "never", "omitted"]).await,
        ["published", "pending", "refused", "pending"]
    );
    assert!(world.state("never").await.1.is_some_and(|message| !message.is_empty()));
    assert_eq!(world.state("omitted").await.1.as_deref(), Some(LEFT_OUT_MESSAGE));
    let pending = world
        .ledger
        .run(async |conn| publications::pending(conn, world.source.id).await)
        .await
        .unwrap();
    assert_eq!(
        (pending.events, pending.unanswered),
        (2, 1),
        "only an omitted event may have been accepted"
    );

    // within half a minute, the shortest minute with jitter, neither is due
    world.pass(TimeDelta::seconds(29));
    assert_eq!(world.cycle().await.requests, 0);
    world.pass(TimeDelta::seconds(62));
    assert_eq!(world.cycle().await.accepted, 2);
    assert_eq!(
        ["good", "later", "never", "omitted"].map(|id| world.times_billed(id)),
        [1, 1, 0, 1]
    );
    let verdicts: Vec<(String, String)> = sqlx::query_as(
        "select event_id, verdict from publication_attempt join publication_request r on r.id = request_id order by sent_at, event_id",
    )
    .fetch_all(&world.ledger.pool)
    .await
    .unwrap();
    let expected = [
        ("good", "accepted"),
        ("later", "refused_for_now"),
        ("never", "refused"),
        ("omitted", "left_out"),
        ("later", "accepted"),
        ("omitted", "accepted"),
    ];
    assert_eq!(verdicts, expected.map(|(id, verdict)| (id.to_owned(), verdict.to_owned())));
}

#[tokio::test]
async fn a_refusal_for_now_waits_longer_each_time() {
    let world = World::with(rules(vec![rule(Behaviour::RefuseForNow, "later", 4)])).await;
    world.add(&[usage("later", start_time())]).await;
    for refusals in 0..4 {
        assert_eq!(world.cycle().await.refused_for_now, 1);
        let due: DateTime<Utc> = sqlx::query_scalar("select next_attempt_at from publication")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
        let wait = (due - world.clock.now()).as_seconds_f64();
        let middle = f64::from(60 << refusals);
        assert!((middle / 2.0..=middle * 1.5).contains(&wait), "{refusals}: {wait}");
        world.clock.set(due);
    }
    assert_eq!(world.cycle().await.accepted, 1);
}

#[tokio::test]
async fn a_clock_that_was_fast_for_a_while_delays_no_event() {
    let world = World::with(rules(vec![rule(Behaviour::RefuseForNow, "refused", 1)])).await;
    let (ahead, right) = (start_time() + TimeDelta::days(3), start_time());
    world.clock.set(ahead);
    world.add(&[usage("refused", right)]).await;
    assert_eq!(world.cycle().await.refused_for_now, 1);
    world.add(&[usage("accepted then", right)]).await;
    world.clock.set(right);
    assert_eq!(world.cycle().await.accepted, 2);
}

#[tokio::test]
async fn a_license_that_the_vendor_refuses_is_read_again_for_the_next_request() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    // issued later, so it signs; the vendor does not know it
    let stray = license(start_time() - TimeDelta::days(1), true);
    world.add_license(&stray).await;
    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert!(matches!(cycle.failure, Some(SendError::Status { status: 401, .. })), "{cycle:?}");
    assert!(matches!(publisher.condition().get(), Condition::Failing(why) if why.contains("401")));
    let pending = world
        .ledger
        .run(async |conn| publications::pending(conn, world.source.id).await)
        .await
        .unwrap();
    assert_eq!((pending.events, pending.unanswered), (1, 0), "a refused request was not taken");

    sqlx::query("delete from licenses where jwt = $1")
        .bind(&stray)
        .execute(&world.coderd)
        .await
        .unwrap();
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 1);
    assert_eq!(publisher.condition().get(), Condition::Working);
    assert_eq!(world.times_billed("a"), 1);

    let rows: Vec<String> =
        sqlx::query_scalar("select publication_request::text from publication_request")
            .fetch_all(&world.ledger.pool)
            .await
            .unwrap();
    assert!(rows.iter().all(|row| !row.contains(&stray)), "no token is kept");
    let samples: BTreeSet<String> = registry.gather().iter().flat_map(described).collect();
    for expected in [
        "tallyline_publisher_verdicts_total accepted 1",
        "tallyline_publisher_send_errors_total status 1",
        "tallyline_publisher_pending 00000000-0000-0000-0000-00000000000d 0",
        "tallyline_publisher_pending_oldest_age_seconds 00000000-0000-0000-0000-00000000000d 0",
    ] {
        assert!(samples.contains(expected), "{expected} is not in {samples:#?}");
    }
}

#[tokio::test]
async fn the_backlog_is_shown_without_coderds_database() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    sqlx::raw_sql("alter table usage_events rename to usage_events_away")
        .execute(&world.coderd)
        .await
        .unwrap();
    let registry = Registry::new();
    assert!(world.publisher_in(&registry).cycle(&world.stop).await.is_err());
    let samples: Vec<String> = registry.gather().iter().flat_map(described).collect();
    assert!(
        samples.contains(
            &"tallyline_publisher_pending 00000000-0000-0000-0000-00000000000d 1".to_owned()
        ),
        "{samples:#?}"
    );
}

fn described(family: &prometheus::proto::MetricFamily) -> Vec<String> {
    let number = |metric: &prometheus::proto::Metric| {
        metric.get_counter().value() + metric.get_gauge().value()
    };
    let label = |metric: &prometheus::proto::Metric| metric.get_label()[0].value().to_owned();
    family
        .get_metric()
        .iter()
        .map(|metric| format!("{} {} {}", family.name(), label(metric), number(metric)))
        .collect()
}

#[tokio::test]
async fn without_a_license_that_allows_it_nothing_is_sent_and_the_publisher_is_healthy() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    sqlx::query("delete from licenses").execute(&world.coderd).await.unwrap();
    world.add_license(&license(start_time() - TimeDelta::days(2), false)).await;
    world.add_license("not a license").await;
    let mut publisher = world.publisher();
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    assert_eq!(publisher.condition().get(), Condition::NoLicense);
    assert!(publisher.condition().get().is_healthy());
    assert_eq!(world.vendor.books().requests, 0);
    world.add_license(&first_license()).await;
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 1);
}
