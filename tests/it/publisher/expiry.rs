//! The 30-day line.

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::ledger::Settled;
use tallyline::sim::tallyman::{CutMoment, Cuts, Switches};

use super::world::{World, start_time, usage};

#[tokio::test]
async fn an_event_is_sent_up_to_the_last_microsecond_before_it_is_30_days_old() {
    let world = World::new().await;
    let line = start_time() - TimeDelta::days(30);
    world.add(&[usage("on the line", line), usage("just young enough", line + TimeDelta::microseconds(1))]).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.settled), (1, Settled { expired: 1, ..Settled::default() }));
    assert_eq!(world.delivered(), ["just young enough"]);
    assert_eq!(world.states(&["on the line", "just young enough"]).await, ["expired", "published"]);
    let sequenced: bool = sqlx::query_scalar(
        "select b.sequence is not null and b.kind = 'verdicts' from publication p join batch b on b.id = p.settled_batch_id where p.state = 'expired'",
    )
    .fetch_one(&world.ledger.pool)
    .await
    .unwrap();
    assert!(sequenced);
}

#[tokio::test]
async fn an_event_that_grows_too_old_after_an_unanswered_attempt_is_unknown() {
    let cuts = Cuts { moment: CutMoment::AfterAccepting, next: 1, fraction: 0.0 };
    let world = World::with(Switches { cuts, ..Switches::default() }).await;
    world.add(&[usage("attempted", start_time() - TimeDelta::days(1))]).await;
    assert!(world.cycle().await.failure.is_some());
    world.add(&[usage("never attempted", start_time() - TimeDelta::days(1))]).await;
    world.pass(TimeDelta::days(29));
    let cycle = world.cycle().await;
    assert_eq!((cycle.requests, cycle.settled), (0, Settled { expired: 1, unknown: 1, not_ours: 0 }));
    assert_eq!(world.states(&["attempted", "never attempted"]).await, ["unknown", "expired"]);
}

#[tokio::test]
async fn a_clock_that_is_ahead_of_the_ledgers_server_gives_nothing_up() {
    let world = World::new().await;
    let now = Clock::system().now();
    let line = now - TimeDelta::days(30);
    world.add(&[usage("old", line - TimeDelta::hours(1)), usage("young", line + TimeDelta::hours(1))]).await;
    world.pass(now + TimeDelta::days(33) - start_time());
    assert_eq!(world.cycle().await.settled, Settled { expired: 1, ..Settled::default() });
    assert_eq!(world.states(&["old", "young"]).await, ["expired", "pending"]);
}

#[tokio::test]
async fn an_old_event_that_coderd_published_is_not_ours_and_one_that_it_is_publishing_waits() {
    let world = World::new().await;
    let old = start_time() - TimeDelta::days(40);
    world.add(&["published", "claimed", "left", "gone"].map(|id| usage(id, old))).await;
    world.coderd_marks("published", Some(old + TimeDelta::hours(1)), None).await;
    world.coderd_marks("claimed", None, Some(start_time() - TimeDelta::minutes(1))).await;
    sqlx::query("delete from usage_events where id = 'gone'").execute(&world.coderd).await.unwrap();
    let cycle = world.cycle().await;
    assert_eq!(cycle.settled, Settled { not_ours: 1, expired: 2, unknown: 0 });
    assert_eq!(world.states(&["published", "claimed", "left", "gone"]).await, ["not_ours", "pending", "expired", "expired"]);
    world.pass(TimeDelta::hours(1));
    assert_eq!(world.cycle().await.settled.expired, 1);
}

#[tokio::test]
async fn years_of_history_are_settled_page_by_page() {
    let world = World::new().await;
    let usages: Vec<_> =
        (0..1_203).map(|hour| usage(&format!("event-{hour}"), start_time() - TimeDelta::days(400) + TimeDelta::hours(hour))).collect();
    world.add(&usages).await;
    sqlx::query("update usage_events set published_at = created_at where created_at < $1")
        .bind(usages[700].created_at)
        .execute(&world.coderd)
        .await
        .unwrap();
    let cycle = world.cycle().await;
    assert_eq!((cycle.requests, cycle.settled), (0, Settled { not_ours: 700, expired: 503, unknown: 0 }));
    assert_eq!(world.number_in("pending").await, 0);
}
