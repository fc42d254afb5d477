//! The limit of 30 days.

use std::time::Duration;

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::ledger::Settled;
use tallyline::tallyman::ClientSettings;
use tallyline_sim::tallyman::{Config, CutMoment, Cuts, ServerErrors, Switches, Tallyman};

use super::world::{DEPLOYMENT, World, license_until, start_time, usage};

#[tokio::test]
async fn an_event_is_sent_up_to_the_last_microsecond_before_it_is_30_days_old() {
    let world = World::new().await;
    let line = start_time() - TimeDelta::days(30);
    world
        .add(&[
            usage("on the line", line),
            usage("just young enough", line + TimeDelta::microseconds(1)),
        ])
        .await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.settled), (1, Settled { expired: 1, ..Settled::default() }));
    assert_eq!(world.delivered(), ["just young enough"]);
    assert_eq!(world.states(&["on the line", "just young enough"]).await, ["expired", "published"]);
    let sequenced: bool = sqlx::query_scalar(
        "select b.sequence is not null and b.kind = 'verdicts' from settlement s join batch b on b.id = s.batch_id where s.state = 'expired'",
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
    assert_eq!(
        (cycle.requests, cycle.settled),
        (0, Settled { expired: 1, unknown: 1, not_ours: 0 })
    );
    assert_eq!(world.states(&["attempted", "never attempted"]).await, ["unknown", "expired"]);
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
    assert_eq!(
        world.states(&["published", "claimed", "left", "gone"]).await,
        ["not_ours", "pending", "expired", "expired"]
    );
    world.pass(TimeDelta::hours(1));
    assert_eq!(world.cycle().await.settled.expired, 1);
}

#[tokio::test]
async fn years_of_history_are_settled_page_by_page() {
    let world = World::new().await;
    let usages: Vec<_> = (0..1_203)
        .map(|hour| {
            usage(
                &format!("event-{hour}"),
                start_time() - TimeDelta::days(400) + TimeDelta::hours(hour),
            )
        })
        .collect();
    world.add(&usages).await;
    sqlx::query("update usage_events set published_at = created_at where created_at < $1")
        .bind(usages[700].created_at)
        .execute(&world.coderd)
        .await
        .unwrap();
    let cycle = world.cycle().await;
    assert_eq!(
        (cycle.requests, cycle.settled),
        (0, Settled { not_ours: 700, expired: 503, unknown: 0 })
    );
    assert_eq!(world.number_in("pending").await, 0);
}

/// A world at the present time, like coderd's database, and a vendor that cannot accept the first
/// request.
async fn living_now(sole: bool) -> (World, Tallyman) {
    let mut world = World::new().await;
    let now = Clock::system().now();
    world.clock.set(now);
    let license = license_until(now + TimeDelta::days(100), now - TimeDelta::days(1), true);
    world.add_license(&license).await;
    let config = Config {
        license_keys: vec![license],
        deployment_ids: vec![DEPLOYMENT],
        ..Config::default()
    };
    let vendor = Tallyman::start(config, Clock::manual(now), world.stop.clone()).await.unwrap();
    vendor
        .set_switches(Switches {
            errors: ServerErrors { status: 503, next: 1, ..ServerErrors::default() },
            ..Switches::default()
        })
        .unwrap();
    world.settings.tallyman = ClientSettings::new(vendor.ingest_url());
    world.settings.sole = sole;
    (world, vendor)
}

#[tokio::test]
async fn a_fast_clock_expires_nothing() {
    for sole in [true, false] {
        let (world, vendor) = living_now(sole).await;
        let now = world.clock.now();
        world
            .add(&[
                usage("young", now - TimeDelta::days(20)),
                usage("old", now - TimeDelta::days(31)),
            ])
            .await;
        world.clock.set(now + TimeDelta::days(11));
        let cycle = world.cycle().await;
        assert_eq!(
            cycle.settled,
            Settled { expired: 1, ..Settled::default() },
            "sole: {sole}, {cycle:?}"
        );
        assert_eq!(world.states(&["young", "old"]).await, ["pending", "expired"], "sole: {sole}");

        world.clock.set(now);
        world.coderd_marks("young", (!sole).then_some(now), None).await;
        world.cycle().await;
        let (state, billed) = if sole { ("published", 1) } else { ("not_ours", 0) };
        assert_eq!(world.state("young").await.0, state);
        assert_eq!(vendor.books().times_billed(DEPLOYMENT, "young"), billed);
    }
}

#[tokio::test]
async fn a_fast_clock_does_not_delay_sending() {
    let (world, vendor) = living_now(true).await;
    let now = world.clock.now();
    world.add(&[usage("young", now - TimeDelta::days(20))]).await;
    world.clock.set(now + TimeDelta::days(11));
    assert!(world.cycle().await.failure.is_some());
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!(vendor.books().times_billed(DEPLOYMENT, "young"), 1);
}

#[tokio::test]
async fn a_fast_clock_checks_each_event_once_a_cycle() {
    let (world, _vendor) = living_now(false).await;
    let more_than_a_page = world.add_many(501).await.len();
    world.pass(TimeDelta::hours(1));
    let cycle =
        tokio::time::timeout(Duration::from_secs(30), world.cycle()).await.expect("it ends");
    assert_eq!(cycle.waiting, more_than_a_page);
}
