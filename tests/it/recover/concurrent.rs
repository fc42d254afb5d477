//! Two operators who do the same at the same time.

use serde_json::{Value, json};
use tallyline::event::Topic;
use tallyline::ledger::{ActKind, Chain, NewAct, Subject, losses, plans, sources};

use crate::support::ledger::{
    DEPLOYMENT, arrival, lease_partition, ledger, noon, partition, record_batch, usage,
};

/// Enough rows that both are in the middle of them at once.
const EVENTS: u32 = 3_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_recoveries_of_the_same_losses_in_any_order_do_not_deadlock() {
    let (_database, ledger) = ledger().await;
    let source = ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
        })
        .await
        .unwrap();
    let arrivals: Vec<_> = (0..EVENTS).map(|n| arrival(n.into(), usage(DEPLOYMENT, n))).collect();
    let claim = lease_partition(&ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    record_batch(&ledger, &Chain::Live(claim), &arrivals, EVENTS.into()).await.unwrap();
    let ids: Vec<String> = (0..EVENTS).map(|n| format!("usage-{n}")).collect();
    let reversed: Vec<String> = ids.iter().rev().cloned().collect();
    for hash in ["one", "other"] {
        ledger
            .run(async |conn| {
                plans::save(conn, hash, "recover", &Value::Null, &Value::Null, ledger.clock.now())
                    .await
            })
            .await
            .unwrap();
    }
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Recover,
        subject: Subject::Named("coderd"),
        reason: "restored",
        detail: json!({}),
    };
    let (one, other) = tokio::join!(
        ledger.run(async |conn| losses::record(
            conn,
            source.id,
            &ids,
            &act,
            "one",
            ledger.clock.now()
        )
        .await),
        ledger.run(async |conn| losses::record(
            conn,
            source.id,
            &reversed,
            &act,
            "other",
            ledger.clock.now()
        )
        .await)
    );
    assert_eq!((one.unwrap(), other.unwrap()), (true, true));
    let listed: i64 = sqlx::query_scalar("select count(*) from source_lost")
        .fetch_one(&ledger.pool)
        .await
        .unwrap();
    assert_eq!(listed, i64::from(EVENTS));
}
