//! The chain is one, covers every column, and does not depend on the writer's session.

use tallyline::event::Topic;
use tallyline::ledger::{Chain, Disposition, ReplayRange, replays};
use uuid::Uuid;

use super::{Books, differences};
use crate::support::ledger::{
    arrival, event, lease_partition, noon, partition, record_batch, refused,
};

#[tokio::test]
async fn parallel_writers_make_one_chain() {
    let books = Books::empty().await;
    books.register().await;
    let writers = (0..8).map(|number| {
        let ledger = &books.ledger;
        async move {
            for round in 0..6 {
                let at = partition(Topic::AgentUsage, number);
                let lease = lease_partition(ledger, at, 0).await.unwrap();
                let n = u32::try_from(number).unwrap() * 100 + round;
                let arrivals = [arrival(round.into(), event(at.topic, n))];
                let next = i64::from(round) + 1;
                record_batch(ledger, &Chain::Live(lease), &arrivals, next).await.unwrap();
            }
        }
    });
    futures::future::join_all(writers).await;
    let joint = books.chained(Some(books.head().await)).await;
    assert_eq!((differences(&joint), joint.numbers["batches_in_the_chain"]), (vec![], 2 + 8 * 6));
}

#[tokio::test]
async fn the_chain_does_not_depend_on_settings_of_the_session() {
    let books = Books::filled().await;
    books
        .tamper(
            "do $$ declare setting text; begin
                 foreach setting in array array['timezone to ''Asia/Kathmandu''', 'bytea_output to escape', 'datestyle to ''SQL, DMY''',
                     'intervalstyle to iso_8601', 'extra_float_digits to 0', 'standard_conforming_strings to off'] loop
                     execute format('alter database %I set %s', current_database(), setting);
                 end loop; end $$",
        )
        .await;
    books.close().await;
    let books = books.changed("select").await;
    books.record(partition(Topic::AgentUsage, 1), 0).await;
    let joint = books.chained(Some(books.head().await)).await;
    assert_eq!(differences(&joint), []);
}

/// Columns that may change after the batch, or that the chain itself contains.
const NOT_COVERED: [&str; 21] = [
    "batch.chain",
    "batch.sequence",
    // they locate rows
    "batch_part.marks",
    "reject.state",
    "reject.act_id",
    "reject.passed_topic",
    "reject.passed_partition",
    "reject.passed_generation",
    "reject.passed_offset",
    // retention removes a value and leaves its digest, which is covered
    "publication_request.attempts_removed_at",
    "reject.payload_removed_at",
    "reject.unsigned_headers_sha256",
    // the act `sign` has the offsets, and a recovery lowers them
    "signature_cutover.first_offset",
    "signature_cutover.generation",
    "signature_cutover.partition",
    "signature_cutover.recorded_at",
    "signature_cutover.topic",
    "source.bound_deployment_id",
    "source.bound_organization_id",
    // the audit's count
    "source.gone_events",
    "source.retired_act_id",
];

/// A further column must be covered by the content of a batch, or listed.
#[tokio::test]
async fn each_column_of_a_batch_and_its_rows_is_covered() {
    const TABLES: [&str; 15] = [
        "batch",
        "batch_part",
        "reject",
        "settlement",
        "license",
        "source",
        "creation_baseline",
        "operator_act",
        "correction",
        "first_start_change",
        "publication_request",
        "publication_attempt",
        "signature_cutover",
        "source_lost",
        "workspace_first_start",
    ];
    let books = Books::filled().await;
    let mut tx = books.ledger.pool.begin().await.unwrap();
    sqlx::raw_sql(
        "do $$ declare one record; begin
             for one in select conrelid::regclass as of_table, conname from pg_constraint where connamespace = current_schema()::regnamespace
                     and contype in ('c', 'p', 'u', 'f') and conrelid <> 0 loop
                 execute format('alter table %s drop constraint if exists %I cascade', one.of_table, one.conname);
             end loop;
             for one in select table_name, column_name from information_schema.columns
                     where table_schema = current_schema() and is_identity = 'YES' loop
                 execute format('alter table %I alter column %I drop identity', one.table_name, one.column_name);
             end loop;
         end $$",
    )
    .execute(&mut *tx)
    .await
    .unwrap();
    let columns: Vec<(String, String, String)> = sqlx::query_as(
        "select table_name::text, column_name::text, data_type::text from information_schema.columns
         where table_schema = current_schema() and table_name = any($1) order by 1, 2",
    )
    .bind(TABLES.as_slice())
    .fetch_all(&mut *tx)
    .await
    .unwrap();
    assert!(columns.len() > 80, "{columns:?}");
    let digest = "select md5(string_agg(text, ',' order by text)) from (
             select (id, content)::text as text from batch_content
             union all select (batch_id, part, name, digest)::text from chained_row) as covered";
    let before: String = sqlx::query_scalar(digest).fetch_one(&mut *tx).await.unwrap();
    let mut uncovered = Vec::new();
    for (table, column, data_type) in columns {
        let other = match data_type.as_str() {
            "text" => format!("coalesce({column}, '') || 'x'"),
            "uuid" => "gen_random_uuid()".to_owned(),
            "bytea" => format!("coalesce({column}, '') || 'x'::bytea"),
            "boolean" => format!("not {column}"),
            "jsonb" => "'{\"x\": 1}'".to_owned(),
            "timestamp with time zone" => {
                format!("coalesce({column}, now()) + interval '1 microsecond'")
            }
            _ => format!("coalesce({column}, 0) + 1"),
        };
        let change = format!("savepoint one; update {table} set {column} = {other}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(change)).execute(&mut *tx).await.unwrap();
        let after: String = sqlx::query_scalar(digest).fetch_one(&mut *tx).await.unwrap();
        sqlx::raw_sql("rollback to savepoint one").execute(&mut *tx).await.unwrap();
        if after == before {
            uncovered.push(format!("{table}.{column}"));
        }
    }
    let mut expected = NOT_COVERED.map(str::to_owned).to_vec();
    expected.sort_unstable();
    assert_eq!(uncovered, expected);
}

#[tokio::test]
async fn a_reject_of_a_replay_remains_in_its_batch_when_the_live_chain_takes_it_over() {
    let books = Books::empty().await;
    books.register().await;
    let at = partition(Topic::AgentUsage, 0);
    let (first_offset, end_offset) = (0, 8);
    let range =
        ReplayRange { partition: at, generation: 1, first_offset, next_offset: 0, end_offset };
    let (id, nothing) = (Uuid::from_u128(5), serde_json::json!({}));
    let save = books.ledger.run(async |conn| {
        replays::save(conn, id, "a hash", &nothing, &nothing, &[range], noon()).await
    });
    save.await.unwrap();
    let chain = Chain::Replay { id, partition: at, generation: 1, next_offset: 0 };
    let arrivals = [refused(6, Disposition::Rejected), refused(7, Disposition::Held)];
    record_batch(&books.ledger, &chain, &arrivals, 8).await.unwrap();
    books.record(at, 0).await;
    let taken: i64 =
        sqlx::query_scalar("select count(*) from reject where replay_batch_id is not null")
            .fetch_one(&books.ledger.pool)
            .await
            .unwrap();
    let joint = books.chained(None).await;
    assert_eq!((taken, differences(&joint)), (2, vec![]));
    books.tamper("update reject set detail = 'x' where log_offset = 6").await;
    let joint = books.chained(None).await;
    let found: Vec<_> = differences(&joint).into_iter().map(|(kind, ..)| kind).collect();
    assert_eq!(found, ["row_changed", "row_changed"], "in both batches: {joint:#?}");
}
