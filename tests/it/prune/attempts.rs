//! Attempts to publish, and errors of requests.

use chrono::{DateTime, TimeDelta};
use tallyline::audit::Audit;
use tallyline::export::export_usage;
use tallyline::ledger::{
    AttemptVerdict, PruneKind, Settlement, UsageRange, event_history, publication_requests,
    snapshots,
};

use super::{World, days};
use crate::support::ledger::noon;

const KIND: PruneKind = PruneKind::Attempts;

use AttemptVerdict::{Accepted, Failed, Refused, RefusedForNow};

/// The usage of all time, as known at the newest sequence.
async fn export(world: &World) -> String {
    let as_of = world.ledger().run(snapshots::head).await.unwrap();
    let to = noon() + days(9_999);
    let range = UsageRange { from: DateTime::UNIX_EPOCH, to, source: None, as_of };
    let mut bytes = Vec::new();
    export_usage(world.ledger(), &range, &mut bytes).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let [first, second] = [1_u128, 3].map(uuid::Uuid::from_u128);
    assert!(
        text.contains(&format!(",{first},")) && text.contains(&format!(",{second},")),
        "{text}"
    );
    text
}

#[tokio::test]
async fn attempts_go_once_all_events_of_their_request_are_settled_for_long() {
    let world = World::new().await;
    world.usage(1..7).await;
    world.request(1, &[("usage-1", Accepted), ("usage-2", Refused)], None).await;
    world.request(2, &[("usage-3", RefusedForNow), ("usage-4", Accepted)], None).await;
    world.request(4, &[("usage-5", Failed)], Some("HTTP 500: no")).await;
    world.at(days(20));
    world.request(3, &[("usage-3", Accepted)], None).await;
    world.send(5, &["usage-6"]).await;
    let before = export(&world).await;
    assert_eq!(world.differences().await, []);

    world.at(days(400));
    assert_eq!(world.round().await, [].into(), "to the instant");
    world.at(days(400) + TimeDelta::microseconds(1));
    assert_eq!(world.round().await, [(KIND, 2)].into(), "the first request alone");
    world.at(days(421));
    assert_eq!(
        world.round().await,
        [(KIND, 3)].into(),
        "once the retried event is settled for long"
    );
    world.at(days(3_000));
    assert_eq!(world.round().await, [].into(), "two events are not settled");
    let open = "select count(*) from publication_attempt a join publication using (source_id, event_id) where state = 'pending'";
    assert_eq!(
        (world.number(open).await, world.number("select count(*) from publication_attempt").await),
        (2, 2)
    );
    assert_eq!(world.differences().await, []);
    assert_eq!(export(&world).await, before, "the same request is named");

    world.settle("usage-5", Settlement::TooOld).await;
    world.settle("usage-6", Settlement::TooOld).await;
    world.at(days(3_401));
    assert_eq!(world.round().await, [(KIND, 2)].into());
    let error = "select count(*) from publication_request where error is null and (error_sha256 is not null) = (verdicts ? 'failed')";
    assert_eq!(world.number(error).await, 5);
    assert_eq!(world.differences().await, []);
}

#[tokio::test]
async fn what_remains_is_shown() {
    let world = World::new().await;
    world.usage(1..4).await;
    let verdicts = [("usage-1", Accepted), ("usage-2", Accepted), ("usage-3", Refused)];
    world.request(1, &verdicts, None).await;
    let (source_id, ledger) = (world.source_id().await, world.ledger());
    let last = async || {
        let last = ledger.run(async |conn| publication_requests::last(conn, source_id).await);
        last.await.unwrap().unwrap()
    };
    let before = last().await;
    world.at(days(401));
    world.round().await;
    assert_eq!(last().await, before, "the counts by verdict stay");
    let life = ledger
        .run(async |conn| event_history::publication(conn, source_id, "usage-1").await)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((life.removed_attempts, life.attempts.len()), (1, 0));
    assert_eq!(life.attempts_removed_at, Some(noon() + days(401)));
}

#[tokio::test]
async fn a_request_without_an_answer_is_kept_until_none_can_come() {
    let world = World::new().await;
    world.usage(1..2).await;
    world.send(1, &["usage-1"]).await;
    world.settle("usage-1", Settlement::TooOld).await;
    world.at(days(434));
    assert_eq!(world.round().await, [].into());
    world.at(days(436));
    assert_eq!(world.round().await, [(KIND, 1)].into());
    assert_eq!(world.differences().await, []);
}

#[tokio::test]
async fn attempts_that_differ_from_their_batch_stay_as_evidence() {
    let world = World::new().await;
    world.usage(1..3).await;
    world.request(1, &[("usage-1", Accepted)], None).await;
    world.request(2, &[("usage-2", Accepted)], None).await;
    world
        .tamper("update publication_attempt set message = 'another' where event_id = 'usage-1'")
        .await;
    world.at(days(401));
    assert_eq!(world.round().await, [(KIND, 1)].into());
    let kept: String = sqlx::query_scalar("select event_id from publication_attempt")
        .fetch_one(&world.database.pool)
        .await
        .unwrap();
    assert_eq!(kept, "usage-1");
    let audit = Audit {
        ledger: world.ledger().clone(),
        log: world.operations.log.clone(),
        source: None,
        patience: std::time::Duration::ZERO,
    };
    let joint = audit.chained(audit.head().await.unwrap(), None, |_| {}).await.unwrap();
    let found: Vec<_> = joint.differences.iter().map(|row| (&*row.kind, &*row.id)).collect();
    assert_eq!(found, [("row_changed", "usage-1")]);
}
