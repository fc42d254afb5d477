//! A living consumer that makes no progress: it is noticed, and its group is joined again.

use std::time::Duration;

use serde_json::Value;
use tallyline::event::{Topic, TopicPartition};

use super::{Kind, SOON, Site, append_builds, eventually_some};
use crate::support::eventually;

const BUILDS: u32 = 300;

#[tokio::test]
async fn a_stalled_consumer_logs_it_and_joins_again() {
    for kind in [Kind::Postgres, Kind::Kafka] {
        let mut site = Site::registered(kind).await;
        site.set("consume.stall_seconds", "2");
        let mut running = site.start("");
        let log = site.log();
        append_builds(&log, 0..BUILDS).await;
        site.builds(i64::from(BUILDS)).await;

        // Another transaction locks the row of a partition's position: its batches cannot be
        // recorded, while the member's heartbeats go on.
        let mut lock = site.ledger.pool.begin().await.unwrap();
        let position: i64 = sqlx::query_scalar(
            "select next_offset from position where topic = $1 and partition = 0 for update",
        )
        .bind(Topic::WorkspaceBuilds.name())
        .fetch_one(&mut *lock)
        .await
        .unwrap();
        append_builds(&log, BUILDS..2 * BUILDS).await;
        let said = running
            .says(&[
                "consumer stalled",
                "tallyline.workspace-builds.v1/0",
                &format!("\"position\":{position}"),
            ])
            .await;
        assert!(said.contains("\"log_end\":") && said.contains("\"stalled_seconds\":"), "{said}");
        running.says(&["consumer rejoins the group"]).await;
        // it is back in its group, and the partition that cannot be leased blocks no other
        eventually(SOON, "it has joined again", || async {
            joined(&running.process.stderr()) >= 2
        })
        .await;
        for partition in [1, 2] {
            let (_, end) = log
                .watermarks(TopicPartition { topic: Topic::WorkspaceBuilds, partition })
                .await
                .unwrap();
            eventually(SOON, "the other partitions go on", || async {
                let position: i64 = sqlx::query_scalar(
                    "select next_offset from position where topic = $1 and partition = $2",
                )
                .bind(Topic::WorkspaceBuilds.name())
                .bind(partition)
                .fetch_one(&site.ledger.pool)
                .await
                .unwrap();
                position == end
            })
            .await;
        }
        let metrics = running.metrics().await;
        assert!(
            metrics.contains(
                "tallyline_consumer_stalls_total{topic=\"tallyline.workspace-builds.v1\"} 1\n"
            ),
            "{metrics}"
        );

        lock.rollback().await.unwrap();
        site.builds(i64::from(2 * BUILDS)).await;
        let numbers = site.balanced().await;
        assert_eq!(numbers["accepted"], 2 * BUILDS);
        running.ready().await;
        running.ends_in_order().await;
    }
}

#[tokio::test]
async fn a_retried_batch_is_shown_and_logged_once_and_succeeds_by_itself() {
    let site = Site::registered(Kind::Postgres).await;
    let mut running = site.start("");
    running.ready().await;
    for (n, code) in (0..).zip(["XX000", "26000", "0A000", "25P02"]) {
        let trigger = format!(
            "create sequence tries;
             create function refuse() returns trigger language plpgsql as $$
             begin
                 if new.id = 'usage-{n}' and nextval('tries') > 0 then
                     raise exception 'refused with {code}' using errcode = '{code}';
                 end if;
                 return new;
             end
             $$;
             create trigger refuses before insert on usage_event for each row execute function refuse()"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(trigger)).execute(&site.ledger.pool).await.unwrap();
        let event = crate::support::ledger::usage(crate::support::ledger::DEPLOYMENT, n);
        let place =
            site.log().append(Topic::AgentUsage, vec![event.to_message()]).await.unwrap()[0].0;
        let partition = TopicPartition { topic: Topic::AgentUsage, partition: place }.to_string();
        let reason = format!("refused with {code}");
        eventually(SOON, "it is tried three times", || async {
            site.count("select last_value from tries").await > 3
        })
        .await;
        running.not_ready("partitions", &[&partition, &reason]).await;
        assert!(running.metrics().await.contains("tallyline_consumer_partitions_not_read 1\n"));
        eventually_some(SOON, "status shows it", async || {
            let status = site.status().await;
            let is_shown = |process: &Value| {
                process["standing"]["consume"]["not_read"][&partition]
                    .as_str()
                    .is_some_and(|why| why.contains(&reason))
            };
            status["processes"].as_array().unwrap().iter().any(is_shown).then_some(())
        })
        .await;
        sqlx::raw_sql(
            "drop trigger refuses on usage_event; drop function refuse; drop sequence tries",
        )
        .execute(&site.ledger.pool)
        .await
        .unwrap();
        running.ready().await;
        assert_eq!(site.count("select count(*) from usage_event").await, i64::from(n) + 1);
        assert!(running.metrics().await.contains("tallyline_consumer_partitions_not_read 0\n"));
        let logged: Vec<_> = running
            .lines()
            .into_iter()
            .filter(|line| line["reason"].as_str().is_some_and(|why| why.contains(&reason)))
            .collect();
        assert_eq!(logged.len(), 1, "{logged:?}");
    }
    assert_eq!(site.balanced().await["accepted"], 4);
    running.ends_in_order().await;
}

fn joined(log: &str) -> usize {
    log.lines().filter(|line| line.contains("partitions assigned")).count()
}

#[tokio::test]
async fn a_consumer_with_nothing_to_read_and_one_that_is_paused_do_not_stall() {
    let mut site = Site::registered(Kind::Postgres).await;
    site.set("consume.stall_seconds", "1");
    let mut running = site.start("");
    let log = site.log();
    append_builds(&log, 0..BUILDS).await;
    site.builds(i64::from(BUILDS)).await;
    let paused = site.command("pause consume --reason a-test").await;
    assert!(paused.status.success(), "{paused:?}");
    running.says(&["partitions held"]).await;
    append_builds(&log, BUILDS..2 * BUILDS).await;
    // Records wait for well over the second: the pause lasts until the database's clock has passed
    // it.
    eventually(SOON, "five seconds are over", || async {
        site.count("select (extract(epoch from clock_timestamp() - acted_at) > 5)::int::bigint from operator_act where act = 'pause'").await
            == 1
    })
    .await;
    assert_eq!(site.count("select count(*) from workspace_build").await, i64::from(BUILDS));
    let resumed = site.command("resume consume").await;
    assert!(resumed.status.success(), "{resumed:?}");
    site.builds(i64::from(2 * BUILDS)).await;
    assert!(!running.process.stderr().contains("consumer stalled"), "{}", running.process.stderr());
    assert!(running.ends_in_order().await < Duration::from_secs(15));
}
