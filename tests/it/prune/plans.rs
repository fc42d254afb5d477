//! `prune plan` and `prune execute`.

use tallyline::ledger::{ActFilter, ActKind, PROGRAM, PruneKind, acts};
use tallyline::operations::{Actor, OperationError, PruneExecution, PruneRequest};

use super::{World, broken, days, operator};
use crate::support::ledger::{act, ask, noon};

#[tokio::test]
async fn exactly_the_plan_is_executed_and_counted_in_an_act() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1), broken(2), broken(3)]).await;
    world.discard(&ids[..1]).await;
    world.at(days(1));
    world.discard(&ids[1..2]).await;
    world.at(days(180) + days(2));
    let plan = ask(&world.operations, &PruneRequest { at: None }).await.unwrap();
    let planned = &plan.kinds[0];
    assert_eq!((planned.kind, planned.days, planned.rows), (PruneKind::RejectPayloads, 180, 2));
    assert!(planned.bytes > 100, "{planned:?}");
    assert_eq!((planned.oldest, planned.newest), (Some(noon()), Some(noon() + days(1))));
    assert_eq!(plan.kinds.iter().map(|kind| kind.rows).sum::<i64>(), 2);
    assert_eq!(ask(&world.operations, &PruneRequest { at: None }).await.unwrap(), plan);

    let execution = PruneExecution {
        prune: PruneRequest { at: Some(plan.at) },
        hash: plan.hash.clone().unwrap(),
    };
    let run = async |execution: &PruneExecution, actor: &Actor| {
        act(&world.operations, execution, actor).await
    };
    let nameless = Actor { reason: " ".to_owned(), ..operator() };
    let invalid = |field: &'static str, error: OperationError| match error {
        OperationError::Invalid { field: named, .. } => assert_eq!(named, field),
        other => panic!("{other}"),
    };
    invalid("reason", run(&execution, &nameless).await.unwrap_err());
    let without = PruneExecution { prune: PruneRequest { at: None }, ..execution.clone() };
    invalid("at", run(&without, &operator()).await.unwrap_err());
    let later = PruneRequest { at: Some(plan.at + days(1)) };
    invalid("at", ask(&world.operations, &later).await.unwrap_err());

    // another reject becomes part of what is due
    world.tamper("update reject set state = 'discarded', act_id = (select min(id) from operator_act where act = 'discard') where state = 'open'").await;
    let refused = run(&execution, &operator()).await.unwrap_err();
    assert!(refused.to_string().contains("plan again"), "{refused}");
    assert_eq!(world.number("select count(*) from reject where payload is null").await, 0);
    let reopened =
        "update reject set state = 'open', act_id = null where id = (select max(id) from reject)";
    world.tamper(reopened).await;

    let pruned = run(&execution, &operator()).await.unwrap();
    assert_eq!((pruned.kinds[0].kind, pruned.kinds[0].removed.rows), (planned.kind, 2));
    assert_eq!(pruned.kinds[0].removed.bytes, planned.bytes);
    let filter = ActFilter { act: Some(ActKind::Prune), ..ActFilter::default() };
    let written =
        world.ledger().run(async |conn| acts::list(conn, &filter, 10).await).await.unwrap();
    assert_eq!(written.len(), 1);
    assert_eq!((Some(written[0].id), written[0].actor.as_str()), (pruned.act_id, "operator-1"));
    assert_eq!(
        (&written[0].subject, written[0].reason.as_str()),
        (&pruned.hash, "the disk is full")
    );
    assert_eq!(written[0].detail["removed"]["reject_payloads"]["rows"], 2);

    assert_eq!(ask(&world.operations, &PruneRequest { at: None }).await.unwrap().hash, None);
    run(&execution, &operator()).await.unwrap_err();
    assert_eq!(world.differences().await, []);
}

#[tokio::test]
async fn what_the_program_removed_before_is_counted_apart() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1), broken(2)]).await;
    world.discard(&ids[..1]).await;
    world.at(days(1));
    world.discard(&ids[1..]).await;
    world.at(days(180) + chrono::TimeDelta::hours(1));
    world.round().await;
    world.at(days(182));
    let plan = ask(&world.operations, &PruneRequest { at: None }).await.unwrap();
    let execution =
        PruneExecution { prune: PruneRequest { at: Some(plan.at) }, hash: plan.hash.unwrap() };
    act(&world.operations, &execution, &operator()).await.unwrap();
    let filter = ActFilter { act: Some(ActKind::Prune), ..ActFilter::default() };
    let written =
        world.ledger().run(async |conn| acts::list(conn, &filter, 10).await).await.unwrap();
    let counted: Vec<_> = written
        .iter()
        .map(|act| (act.actor.as_str(), act.detail["removed"]["reject_payloads"]["rows"].clone()))
        .collect();
    assert_eq!(counted, [("operator-1", 1.into()), (PROGRAM, 1.into())]);
    assert_eq!(world.differences().await, []);
}
