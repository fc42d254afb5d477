//! Only confirmed events are released for sending once coderd no longer has them.

use std::time::Duration;

use tallyline::coderd;
use tallyline::event::Topic;
use tallyline::ledger::{Arrival, Chain};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::Desk;
use tallyline::operations::recover::{Lost, RecoverEffect, RecoverExecution, RecoverRequest};
use tallyline::sim::coderd::{SchemaVersion, create_schema};
use tokio_util::sync::CancellationToken;

use super::world::operator;
use crate::support;
use crate::support::ledger::{DEPLOYMENT, arrival, build, desk, partition, registered_ledger, usage};

#[tokio::test]
async fn an_event_that_was_never_confirmed_is_not_released_when_coderd_does_not_have_it() {
    let (_database, ledger) = registered_ledger().await;
    for (topic, of) in [(Topic::WorkspaceBuilds, build as fn(uuid::Uuid, u32) -> _), (Topic::AgentUsage, usage)] {
        let claim = ledger.claim(partition(topic, 0), 0).await.unwrap();
        let arrivals = [1, 2].map(|n: u32| Arrival { confirmed: n == 1, ..arrival(n.into(), of(DEPLOYMENT, n)) });
        ledger.record(&Chain::Live(claim), &arrivals, 3).await.unwrap();
    }
    let source = support::database().await;
    create_schema(&mut source.pool.acquire().await.unwrap(), SchemaVersion::Sep2026).await.unwrap();
    let database = coderd::Database::new(&source.url, Duration::from_secs(10)).unwrap();
    let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
    let desk = Desk { coderd: Some(database), deployment: Some(DEPLOYMENT), ..desk(&ledger, &log) };
    let (request, stop) = (RecoverRequest { lost: Lost::Coderd, without: Vec::new() }, CancellationToken::new());
    let plan = desk.plan_recovery(&request, &|_, _| {}, &stop).await.unwrap();
    let RecoverEffect::Coderd(effect) = &plan.effect else { panic!("{plan:?}") };
    assert_eq!((effect.unconfirmed, effect.to_list), (2, 2), "{effect:?}");
    let execution = RecoverExecution { hash: plan.hash.clone().unwrap() };
    desk.execute_recovery(&execution, &operator(), &|_, _| {}, &stop).await.unwrap();
    let listed: Vec<String> = sqlx::query_scalar("select event_id from source_lost order by 1").fetch_all(&ledger.pool).await.unwrap();
    assert_eq!(listed, ["usage-1".to_owned(), build(DEPLOYMENT, 1).id()]);
}
