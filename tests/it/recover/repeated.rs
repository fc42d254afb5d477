//! A second loss is recovered a second time, even if nothing else has changed.

use serde_json::json;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::recover::{RecoverExecution, RecoverPlan, RecoverRequest};
use tallyline::operations::{Actor, OperationError, Operations};

use crate::support::ledger::{act, ask, ledger, operations};

async fn plan(operations: &Operations) -> RecoverPlan {
    let request: RecoverRequest = serde_json::from_value(json!({ "lost": "log" })).unwrap();
    ask(operations, &request).await.unwrap()
}

async fn execute(
    operations: &Operations,
    plan: &RecoverPlan,
) -> Result<RecoverPlan, OperationError> {
    let execution = RecoverExecution { hash: plan.hash.clone().expect("something to do") };
    let actor = Actor { name: "sre-1".into(), reason: "the topics are gone".into() };
    act(operations, &execution, &actor).await
}

#[tokio::test]
async fn topics_lost_a_second_time_are_created_again() {
    let (_database, ledger) = ledger().await;
    let operations =
        operations(&ledger, &Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()));
    for _ in 0..2 {
        let planned = plan(&operations).await;
        execute(&operations, &planned).await.unwrap();
        let twice = execute(&operations, &planned).await.unwrap_err();
        assert!(
            matches!(&twice, OperationError::Forbidden(why) if why.contains("plan again")),
            "{twice}"
        );
        assert_eq!(plan(&operations).await.hash, None, "nothing is lost");
        let lost = "delete from log_partition; delete from log_topic";
        sqlx::raw_sql(lost).execute(&ledger.pool).await.unwrap();
    }
    let acts: i64 = sqlx::query_scalar("select count(*) from operator_act where act = 'recover'")
        .fetch_one(&ledger.pool)
        .await
        .unwrap();
    assert_eq!(acts, 2);
}
