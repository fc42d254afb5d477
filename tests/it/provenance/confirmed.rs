//! Only confirmed events may be sent after coderd has lost them.

use std::time::Duration;

use tallyline::coderd;
use tallyline::event::Topic;
use tallyline::ledger::{Arrival, Chain, Ledger};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::recover::{
    CoderdEffect, Lost, RecoverEffect, RecoverExecution, RecoverRequest,
};
use tallyline::operations::{OperationError, Operations};
use tallyline_sim::coderd::{SchemaVersion, create_schema};
use uuid::Uuid;

use super::world::operator;
use crate::support::coderd::identify;
use crate::support::ledger::{
    DEPLOYMENT, act, arrival, ask, build, lease_partition, operations, partition, record_batch,
    registered_ledger, usage,
};
use crate::support::{self, Database};

/// A confirmed and an unconfirmed event of each of these topics.
async fn ledger_with(topics: &[Topic]) -> (Database, Ledger) {
    let (database, ledger) = registered_ledger().await;
    for topic in topics.iter().copied() {
        let of = if topic == Topic::AgentUsage { usage } else { build };
        let claim = lease_partition(&ledger, partition(topic, 0), 0).await.unwrap();
        let arrivals = [1, 2]
            .map(|n: u32| Arrival { confirmed: n == 1, ..arrival(n.into(), of(DEPLOYMENT, n)) });
        record_batch(&ledger, &Chain::Live(claim), &arrivals, 3).await.unwrap();
    }
    (database, ledger)
}

/// Operations with a coderd without rows.
async fn operations_without_rows(ledger: &Ledger) -> (Database, Operations) {
    let source = support::database().await;
    create_schema(&mut source.pool.acquire().await.unwrap(), SchemaVersion::Sep2026).await.unwrap();
    let database = coderd::Database::new(&source.url, Duration::from_secs(10)).unwrap();
    let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
    let operations = Operations {
        coderd: Some(database),
        deployment: Some(DEPLOYMENT),
        ..operations(ledger, &log)
    };
    (source, operations)
}

async fn plan(operations: &Operations) -> (Option<String>, CoderdEffect) {
    let request = RecoverRequest { lost: Lost::Coderd, without: Vec::new() };
    let plan = ask(operations, &request).await.unwrap();
    let RecoverEffect::Coderd(effect) = plan.effect else { panic!("{plan:?}") };
    (plan.hash, effect)
}

#[tokio::test]
async fn an_event_that_was_never_confirmed_is_not_released_when_coderd_does_not_have_it() {
    let (_database, ledger) = ledger_with(&[Topic::WorkspaceBuilds, Topic::AgentUsage]).await;
    let (_source, operations) = operations_without_rows(&ledger).await;
    let (hash, effect) = plan(&operations).await;
    assert_eq!((effect.unconfirmed, effect.to_list, effect.gone_builds), (2, 1, 1), "{effect:?}");
    let execution = RecoverExecution { hash: hash.unwrap() };
    act(&operations, &execution, &operator()).await.unwrap();
    let listed: Vec<String> = sqlx::query_scalar("select event_id from source_lost order by 1")
        .fetch_all(&ledger.pool)
        .await
        .unwrap();
    assert_eq!(listed, ["usage-1"]);
}

/// coderd removes old builds by design: that is not a loss.
#[tokio::test]
async fn builds_that_coderd_has_removed_leave_nothing_to_recover() {
    let (_database, ledger) = ledger_with(&[Topic::WorkspaceBuilds]).await;
    let (_source, operations) = operations_without_rows(&ledger).await;
    let (hash, effect) = plan(&operations).await;
    assert_eq!(
        (hash, effect.gone_builds, effect.unconfirmed, &effect.lost[..]),
        (None, 1, 1, &[][..])
    );
}

#[tokio::test]
async fn a_recovery_is_not_planned_from_another_coderd_that_hides_one_fact() {
    let (_database, ledger) = ledger_with(&[Topic::WorkspaceBuilds]).await;
    let (source, operations) = operations_without_rows(&ledger).await;
    let other = Uuid::from_u128(0xf);
    identify(&source.pool, DEPLOYMENT, other).await;
    sqlx::query("delete from site_configs").execute(&source.pool).await.unwrap();
    let request = RecoverRequest { lost: Lost::Coderd, without: Vec::new() };
    let error = ask(&operations, &request).await.unwrap_err();
    assert!(
        matches!(&error, OperationError::Forbidden(why) if why.contains(&other.to_string())),
        "{error}"
    );
}
