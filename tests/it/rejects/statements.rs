//! A batch of rejects takes a constant number of statements, and one that takes too long is
//! recorded in smaller ones.

use std::time::Duration;

use prometheus::Registry;
use tallyline::consumer::{Consumer, ConsumerTelemetry};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::support::eventually;
use crate::support::ledger::GROUP;

const SOON: Duration = Duration::from_secs(120);

fn unreadable(rejects: u32) -> Vec<Message> {
    (0..rejects).map(|n| with_body(&usage(DEPLOYMENT, n), "{")).collect()
}

/// The statements that change rows while one batch of this number of rejects is recorded.
async fn statements_of(rejects: u32) -> i64 {
    let site = Site::new(Backend::Postgres).await;
    site.append(unreadable(rejects)).await;
    sqlx::raw_sql(
        "create sequence statements;
         create function count_statement() returns trigger language plpgsql as $$
         begin
             perform nextval('statements');
             return null;
         end
         $$;
         do $$
         declare
             name text;
         begin
             for name in select relname from pg_class
                 where relkind in ('r', 'p') and relnamespace = 'public'::regnamespace and not relispartition
             loop
                 execute format('create trigger counts_statements after insert or update or delete on %I
                     for each statement execute function count_statement()', name);
             end loop;
         end
         $$",
    )
    .execute(&site.database.pool)
    .await
    .unwrap();
    assert_eq!(site.consume().await.rejects, i32::try_from(rejects).unwrap());
    site.number("select last_value from statements").await
}

#[tokio::test]
async fn a_batch_of_5_000_rejects_takes_as_many_statements_as_one_of_50() {
    let (few, many) = (statements_of(50).await, statements_of(5_000).await);
    assert_eq!(few, many);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_rejects_that_takes_too_long_is_recorded_in_smaller_ones() {
    let site = Site::new(Backend::Postgres).await;
    site.append(unreadable(100)).await;
    sqlx::raw_sql(
        "create function slow() returns trigger language plpgsql as $$
         begin
             if (select count(*) from added) > 30 then
                 raise exception 'canceling statement due to statement timeout' using errcode = '57014';
             end if;
             return null;
         end
         $$;
         create trigger slow after insert on reject referencing new table as added for each statement execute function slow()",
    )
    .execute(&site.database.pool)
    .await
    .unwrap();
    let Operations { log, ledger, .. } = &site.operations;
    let telemetry = ConsumerTelemetry::register(&Registry::new()).unwrap();
    let consumer = Consumer::new(log.clone(), ledger.clone(), GROUP, telemetry);
    let stop = CancellationToken::new();
    let signal = stop.clone();
    let running = tokio::spawn(async move { consumer.run(&signal).await });
    eventually(SOON, "every reject is recorded", async || {
        site.number("select count(*) from reject").await >= 100
    })
    .await;
    stop.cancel();
    tokio::time::timeout(SOON, running).await.expect("it ends").unwrap();
    assert_eq!(site.number("select count(distinct log_offset) from reject").await, 100);
    assert!(site.number("select count(*) from batch where kind = 'log'").await >= 4);
}
