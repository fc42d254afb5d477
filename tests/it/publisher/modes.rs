//! coderd's own publishing beside Tallyline's, and which of them may publish.

use std::time::Duration;

use chrono::TimeDelta;
use tallyline::ledger::{HeldFor, Pausable, Pause, Settled, publications};
use tallyline::operations::{Actor, CoderdCutOff, OperationError};
use tallyline::pauses::Paused;
use tallyline::publisher::{Condition, Publisher};
use tallyline::status;
use tallyline_sim::tallyman::Switches;

use super::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::eventually;
use crate::support::ledger::act;

#[tokio::test]
async fn usage_published_by_coderd_is_not_ours() {
    let world = World::new().await;
    world.add(&["theirs", "ours"].map(|id| usage(id, start_time()))).await;
    world.coderd_marks("theirs", Some(start_time()), None).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.settled.not_ours), (1, 1));
    assert_eq!(world.delivered(), ["ours"]);
    assert_eq!(world.states(&["theirs", "ours"]).await, ["not_ours", "published"]);
}

#[tokio::test]
async fn an_event_that_coderd_has_freshly_claimed_waits() {
    let world = World::new().await;
    world.add(&["claimed", "free"].map(|id| usage(id, start_time()))).await;
    world.coderd_marks("claimed", None, Some(start_time() - TimeDelta::minutes(42))).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.waiting), (1, 1));
    world.pass(TimeDelta::minutes(17));
    assert_eq!(world.cycle().await.waiting, 1, "the claim is 59 minutes old");
    world.pass(TimeDelta::minutes(2));
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!(world.delivered(), ["free", "claimed"]);
}

#[tokio::test]
async fn an_event_whose_row_differs_is_held_until_it_matches_again() {
    let world = World::new().await;
    world.add(&["value", "time", "gone", "good"].map(|id| usage(id, start_time()))).await;
    for change in [
        "update usage_events set event_data = '{\"count\": 5}' where id = 'value'",
        "update usage_events set created_at = created_at + interval '1 microsecond' where id = 'time'",
        "delete from usage_events where id = 'gone'",
    ] {
        sqlx::query(change).execute(&world.coderd).await.unwrap();
    }
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (1, 3));
    assert_eq!(world.delivered(), ["good"]);
    for (id, why) in [
        ("value", "dc_managed_agents_v1 5"),
        ("time", "row is dated"),
        ("gone", "no longer has the row"),
    ] {
        let (state, message) = world.state(id).await;
        assert!(
            state == "pending" && message.as_ref().is_some_and(|message| message.contains(why)),
            "{message:?}"
        );
        assert_eq!(world.held_for(id).await, Some(HeldFor::CoderdDiffers));
    }
    assert_eq!(
        world
            .ledger
            .run(async |conn| publications::pending(conn, world.source.id).await)
            .await
            .unwrap()
            .held_back,
        3
    );

    sqlx::query("update usage_events set event_data = '{\"count\": 1}' where id = 'value'")
        .execute(&world.coderd)
        .await
        .unwrap();
    world.pass(TimeDelta::minutes(10));
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (1, 2));
    assert_eq!(
        world
            .ledger
            .run(async |conn| publications::pending(conn, world.source.id).await)
            .await
            .unwrap()
            .held_back,
        2
    );
}

fn has_stopped(publisher: &Publisher) -> bool {
    let condition = publisher.condition().get();
    let text = condition.to_string();
    matches!(condition, Condition::Stopped(_))
        && text.contains("coderd itself published usage")
        && text.contains("--coderd-cut-off")
}

#[tokio::test]
async fn publishing_stops_over_restarts_when_coderd_publishes_by_itself() {
    let world = World::new().await;
    world.add(&["before", "first"].map(|id| usage(id, start_time()))).await;
    world.coderd_marks("before", Some(start_time()), None).await;
    let mut publisher = world.publisher();
    assert_eq!(
        publisher.cycle(&world.stop).await.unwrap().accepted,
        1,
        "earlier publications of coderd do not stop it"
    );

    world.add(&["second", "third"].map(|id| usage(id, start_time()))).await;
    world.coderd_marks("second", Some(start_time() + TimeDelta::seconds(1)), None).await;
    for mut publisher in [publisher, world.publisher(), world.publisher()] {
        assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
        assert!(
            has_stopped(&publisher) && !publisher.condition().get().is_healthy(),
            "{}",
            publisher.condition().get()
        );
    }
    assert_eq!(world.delivered(), ["first"]);
    assert_eq!(world.states(&["second", "third"]).await, ["pending", "pending"]);
}

/// The first look may come before coderd published anything, and from a process that has ended.
#[tokio::test]
async fn the_first_check_of_coderds_marks_survives_a_restart() {
    let world = World::new().await;
    assert_eq!(world.cycle().await.requests, 0);
    world.add(&["one", "two"].map(|id| usage(id, start_time()))).await;
    world.coderd_marks("one", Some(start_time()), None).await;
    let mut publisher = world.publisher();
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    assert!(has_stopped(&publisher), "{}", publisher.condition().get());
}

#[tokio::test]
async fn publishing_resumes_once_an_operator_confirms_that_coderds_publisher_is_cut_off() {
    let world = World::new().await;
    let log = world.log().await;
    let mut publisher = world.publisher();
    publisher.cycle(&world.stop).await.unwrap();
    world.add(&["one", "two", "three"].map(|id| usage(id, start_time()))).await;
    world.coderd_marks("one", Some(start_time()), None).await;
    publisher.cycle(&world.stop).await.unwrap();
    assert!(has_stopped(&publisher));
    let holds = status::read(&world.ledger, &log, Duration::from_secs(10)).await.unwrap().holds;
    assert!(
        holds.len() == 1 && holds[0].deployment_id == Some(DEPLOYMENT) && holds[0].since.is_some(),
        "{holds:?}"
    );

    let (operations, request) =
        (world.operations(&log), CoderdCutOff { deployment_id: DEPLOYMENT });
    let actor = |reason: &str| Actor { name: "sre-1".into(), reason: reason.into() };
    assert!(matches!(
        act(&operations, &request, &actor(" ")).await,
        Err(OperationError::Invalid { field: "reason", .. })
    ));
    act(&operations, &request, &actor("its usage publisher is disabled")).await.unwrap();
    assert!(matches!(
        act(&operations, &request, &actor("again")).await,
        Err(OperationError::NotFound(_))
    ));
    let acts: Vec<(String, String, String)> =
        sqlx::query_as("select actor, act, reason from operator_act")
            .fetch_all(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(acts, [("sre-1".into(), "resume".into(), "its usage publisher is disabled".into())]);
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert_eq!((cycle.accepted, cycle.settled.not_ours), (2, 1), "the same process goes on");

    world.add(&[usage("four", start_time()), usage("five", start_time())]).await;
    world.coderd_marks("four", Some(start_time() + TimeDelta::seconds(1)), None).await;
    publisher.cycle(&world.stop).await.unwrap();
    assert!(has_stopped(&publisher), "a later mark stops it again");
}

/// coderd's rows cannot be read, and the leases cannot be released either.
#[tokio::test]
async fn a_fault_while_leases_are_released_does_not_hide_the_first_fault() {
    let world = World::new().await;
    world.add(&[usage("one", start_time())]).await;
    sqlx::raw_sql("alter table usage_events rename column event_data to data")
        .execute(&world.coderd)
        .await
        .unwrap();
    sqlx::raw_sql(
        "create function refuse() returns trigger language plpgsql as 'begin raise exception ''no release''; end';
         create trigger refuse before update on publication for each row
             when (old.leased_by is not null and new.leased_by is null) execute function refuse()",
    )
    .execute(&world.ledger.pool)
    .await
    .unwrap();
    let mut publisher = world.publisher();
    let fault = format!("{:#}", publisher.cycle(&world.stop).await.unwrap_err());
    assert!(fault.contains("event_data") && !fault.contains("no release"), "{fault}");
    assert!(publisher.condition().get().to_string().contains("event_data"));
}

#[tokio::test]
async fn shadow_sends_nothing_and_follows_coderds_own_marks() {
    let mut world = World::new().await;
    world.settings.sole = false;
    let old = start_time() - TimeDelta::days(31);
    world.add(&["published", "waiting", "changed"].map(|id| usage(id, start_time()))).await;
    world.add(&["old", "old and published"].map(|id| usage(id, old))).await;
    world.coderd_marks("published", Some(start_time()), None).await;
    world.coderd_marks("old and published", Some(old), None).await;
    sqlx::query("update usage_events set event_data = '{\"count\": 5}' where id = 'changed'")
        .execute(&world.coderd)
        .await
        .unwrap();
    let mut publisher = world.publisher();
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert_eq!(
        (cycle.settled, cycle.waiting, cycle.held_back),
        (Settled { not_ours: 2, expired: 1, unknown: 0 }, 1, 1)
    );
    assert_eq!(publisher.condition().get(), Condition::Working);
    assert!(
        world
            .state("changed")
            .await
            .1
            .is_some_and(|message| message.contains("has dc_managed_agents_v1 5"))
    );

    world.coderd_marks("waiting", Some(start_time() + TimeDelta::minutes(17)), None).await;
    sqlx::query("update usage_events set event_data = '{\"count\": 1}' where id = 'changed'")
        .execute(&world.coderd)
        .await
        .unwrap();
    world.pass(TimeDelta::minutes(17));
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert_eq!((cycle.settled.not_ours, cycle.waiting, cycle.held_back), (1, 1, 0));
    assert_eq!(
        world.state("changed").await.1,
        None,
        "a difference that is gone is not shown any more"
    );
    assert_eq!(world.vendor.books().requests, 0);
    let requests: i64 = sqlx::query_scalar("select count(*) from publication_request")
        .fetch_one(&world.ledger.pool)
        .await
        .unwrap();
    assert_eq!(requests, 0);
}

#[tokio::test]
async fn a_source_without_coderds_database_publishes_nothing() {
    let mut world = World::new().await;
    world.settings.coderd = None;
    world.add(&[usage("a", start_time())]).await;
    let mut publisher = world.publisher();
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    assert_eq!(publisher.condition().get(), Condition::NoDatabase);
    assert_eq!(world.state("a").await.0, "pending");
    assert_eq!(world.vendor.books().requests, 0);
}

#[tokio::test]
async fn an_unreachable_coderd_database_is_reported_and_holds_no_lease() {
    let mut world = World::new().await;
    let unreachable = tallyline::coderd::Database::new(
        "postgres://unknown@127.0.0.1:1/coder",
        std::time::Duration::from_secs(1),
    )
    .unwrap();
    world.add(&[usage("a", start_time())]).await;
    let original = world.settings.coderd.replace(unreachable);
    let mut publisher = world.publisher();
    assert!(publisher.cycle(&world.stop).await.is_err());
    assert!(
        matches!(publisher.condition().get(), Condition::Failing(why) if why.contains("127.0.0.1:1/coder"))
    );
    world.settings.coderd = original;
    assert_eq!(world.cycle().await.accepted, 1);
}

#[tokio::test]
async fn a_fault_of_coderds_database_in_mid_cycle_releases_the_leases() {
    let mut world = World::new().await;
    world.settings.sole = false;
    world.add(&[usage("a", start_time())]).await;
    sqlx::query("alter table usage_events rename to elsewhere")
        .execute(&world.coderd)
        .await
        .unwrap();
    assert!(world.publisher().cycle(&world.stop).await.is_err());
    sqlx::query("alter table elsewhere rename to usage_events")
        .execute(&world.coderd)
        .await
        .unwrap();
    assert_eq!(world.cycle().await.waiting, 1);
}

#[tokio::test]
async fn a_pause_records_the_answer_in_flight_and_leases_nothing_new() {
    let mut world = World::with(Switches { latency_ms: 3_000, ..Switches::default() }).await;
    let (sender, paused) = Paused::channel();
    (world.settings.paused, world.settings.concurrency) = (paused, 1);
    world.add_many(250).await;
    let mut publisher = world.publisher();
    let requests = || async {
        let count = sqlx::query_scalar::<_, i64>("select count(*) from publication_request")
            .fetch_one(&world.ledger.pool);
        count.await.unwrap()
    };
    let pausing = async {
        eventually(Duration::from_secs(30), "the first request is in flight", || async {
            requests().await == 1
        })
        .await;
        let pause = Pause {
            operation: Pausable::Publish,
            topic: None,
            actor: "user-001".into(),
            reason: "maintenance".into(),
            since: start_time(),
        };
        sender.send_replace(vec![pause]);
    };
    let (cycle, ()) = tokio::join!(publisher.cycle(&world.stop), pausing);
    assert_eq!(
        (
            cycle.unwrap().accepted,
            world.number_in("published").await,
            world.number_in("pending").await
        ),
        (100, 100, 150)
    );
    assert!(
        matches!(publisher.condition().get(), Condition::Paused(why) if why.contains("user-001") && why.contains("maintenance"))
    );
    assert!(publisher.condition().get().is_healthy());
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    let leased: i64 =
        sqlx::query_scalar("select count(*) from publication where leased_until is not null")
            .fetch_one(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!((requests().await, leased), (1, 0));

    sender.send_replace(Vec::new());
    world.vendor.set_switches(Switches::default()).unwrap();
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 150);
    assert_eq!(publisher.condition().get(), Condition::Working);
    assert_eq!(world.vendor.books().billed.iter().filter(|billed| billed.times != 1).count(), 0);
}
