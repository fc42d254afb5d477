//! Rounds of the program: bounded, one process at a time, and without a lost count.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Connection as _;
use tallyline::ledger::{
    ActFilter, ActKind, AttemptVerdict, LeaseError, PROGRAM, PruneKind, Retention, acts, prune,
};
use tallyline::operations::Pruner;
use tokio_util::sync::CancellationToken;

use super::{RETENTION, World, broken, days};
use crate::support::ledger::{noon, take_lease};

/// Discarded rejects: three transactions of a round.
const MANY: u32 = 1_100;

async fn many() -> World {
    let world = World::new().await;
    world.append((0..MANY).map(broken).collect()).await;
    world.consume().await;
    let ids: Vec<i64> = sqlx::query_scalar("select id from reject order by id")
        .fetch_all(&world.database.pool)
        .await
        .unwrap();
    world.discard(&ids).await;
    world
}

const REMOVED: &str = "select count(*) from reject where payload_removed_at is not null";

#[tokio::test]
async fn a_round_that_ends_early_loses_no_count_and_another_process_continues() {
    let world = many().await;
    world.at(days(181));
    // the stop comes after the first transaction; it is the same for a crash, as a round writes
    // nothing else
    let (stop, mut first) =
        (CancellationToken::new(), Pruner::new(world.ledger().clone(), RETENTION));
    let mut each = |_, _| stop.cancel();
    assert!(first.round(&stop, &mut each).await.unwrap());
    assert_eq!((world.number(REMOVED).await, world.uncounted().await), (500, 500));

    // a transaction that fails removes and counts nothing
    world
        .tamper_schema(
            "create function fail() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$;
             create trigger fail before update on prune_kind for each row when (new.rows > old.rows) execute function fail()",
        )
        .await;
    let mut second = Pruner::new(world.ledger().clone(), RETENTION);
    second.round(&CancellationToken::new(), &mut |_, _| {}).await.unwrap_err();
    assert_eq!((world.number(REMOVED).await, world.uncounted().await), (500, 500));
    world.tamper_schema("drop trigger fail on prune_kind").await;

    assert_eq!(world.round().await, [(PruneKind::RejectPayloads, 600)].into());
    assert_eq!((world.number(REMOVED).await, world.uncounted().await), (1_100, 1_100));
    assert_eq!(world.differences().await, []);

    let written = async || {
        let filter = ActFilter { act: Some(ActKind::Prune), ..ActFilter::default() };
        world.ledger().run(async |conn| acts::list(conn, &filter, 10).await).await.unwrap()
    };
    assert_eq!(written().await, [], "one act a day");
    world.at(days(182));
    world.round().await;
    let acts = written().await;
    assert_eq!(acts.len(), 1);
    assert_eq!((acts[0].actor.as_str(), acts[0].subject.as_str()), (PROGRAM, "retention"));
    assert_eq!(acts[0].detail["removed"]["reject_payloads"]["rows"], 1_100);
    assert_eq!(acts[0].detail["days"]["attempts"], 400);
    assert_eq!(world.uncounted().await, 0);
    world.at(days(190));
    world.round().await;
    assert_eq!(written().await.len(), 1, "nothing was removed");
    assert_eq!(world.differences().await, []);
}

impl World {
    async fn tamper_schema(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.database.pool).await.unwrap();
    }
}

#[tokio::test]
async fn one_process_prunes_at_a_time_and_only_with_the_lease() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1)]).await;
    world.discard(&ids).await;
    world.at(days(181));
    let minute = Duration::from_secs(60);
    let lease = take_lease(world.ledger(), prune::LEASE, "other", minute).await.unwrap().unwrap();
    let mut pruner = Pruner::new(world.ledger().clone(), RETENTION);
    let stop = CancellationToken::new();
    assert!(!pruner.round(&stop, &mut |_, _| {}).await.unwrap());

    // a process that lost the lease between its look and its transaction removes nothing
    let before = noon() + days(1);
    let kind = PruneKind::RejectPayloads;
    let page = world.ledger().run(async |conn| prune::due(conn, kind, before, None, &[]).await);
    let due = page.await.unwrap().due;
    assert_eq!(due.len(), 1);
    world.tamper("update lease set epoch = epoch + 1 where name = 'prune'").await;
    let removed = world
        .ledger()
        .run(async |conn| prune::remove(conn, &lease, kind, before, &due, noon()).await)
        .await;
    assert!(matches!(removed, Err(LeaseError::Lost(_))), "{removed:?}");
    assert_eq!(world.number(REMOVED).await, 0);

    world.tamper("update lease set expires_at = now() - interval '1 s' where name = 'prune'").await;
    let mut rows = BTreeMap::new();
    let mut each = |kind, removed: tallyline::ledger::Removed| {
        rows.insert(kind, removed.rows);
    };
    assert!(pruner.round(&stop, &mut each).await.unwrap());
    assert_eq!(rows, [(PruneKind::RejectPayloads, 1)].into());
    let mut another = Pruner::new(world.ledger().clone(), RETENTION);
    assert!(
        !another.round(&stop, &mut |_, _| {}).await.unwrap(),
        "a round was less than a minute ago"
    );
}

#[tokio::test]
async fn nothing_goes_while_a_recovery_is_open_or_if_days_are_0() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1)]).await;
    world.discard(&ids).await;
    world.at(days(9_999));
    let mut keeps = Pruner::new(world.ledger().clone(), Retention::default());
    let stop = CancellationToken::new();
    assert!(keeps.round(&stop, &mut |_, _| panic!("removed")).await.unwrap());
    world
        .tamper("insert into recovery (act_id, opened_at) select max(id), now() from operator_act")
        .await;
    world.tamper("update prune_kind set ran_at = null").await;
    let mut pruner = Pruner::new(world.ledger().clone(), RETENTION);
    assert!(!pruner.round(&stop, &mut |_, _| panic!("removed")).await.unwrap());
    world.tamper("update recovery set closed_at = now()").await;
    assert_eq!(world.round().await, [(PruneKind::RejectPayloads, 1)].into());
}

#[tokio::test]
async fn old_plans_and_snapshots_of_former_versions_go() {
    let world = World::new().await;
    let at = "'2025-08-01T12:00:00Z'::timestamptz";
    let rows = format!(
        "insert into operator_act (batch_id, acted_at, actor, act, subject, reason) select min(id), {at}, 'a', 'replay', 'p', '' from batch;
         insert into plan (hash, kind, request, effect, planned_at, act_id, finished_at) values
             ('unused', 'replay', '{{}}', '{{}}', {at}, null, null),
             ('finished', 'replay', '{{}}', '{{}}', {at}, (select max(id) from operator_act), {at}),
             ('running', 'replay', '{{}}', '{{}}', {at}, (select max(id) from operator_act), null),
             ('later', 'recover', '{{}}', '{{}}', {at} + interval '80 days', null, null);
         insert into replay values (gen_random_uuid(), 'finished', 't', 0, 1, 0, 0, 0), (gen_random_uuid(), 'running', 't', 0, 1, 0, 0, 0);
         insert into snapshot (stage, rules_version, incarnation, sequence, taken_at, pieces)
             select stage, version, incarnation, version, {at}, 1 from ledger,
                 (values ('metrics', 1), ('metrics', 2), ('licenses', 1), ('former', 1)) as rows (stage, version);
         insert into snapshot_piece (stage, rules_version, incarnation, piece, sequence, content)
             select stage, rules_version, incarnation, 'piece', sequence, '\\x00' from snapshot"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(rows)).execute(&world.database.pool).await.unwrap();
    world.at(days(31));
    assert_eq!(world.round().await, [(PruneKind::Snapshots, 2)].into());
    world.at(days(91));
    assert_eq!(world.round().await, [(PruneKind::Plans, 2)].into());
    let left: Vec<String> = sqlx::query_scalar(
        "select hash from plan union all select stage || rules_version from snapshot join snapshot_piece using (stage, rules_version, incarnation, sequence)
             union all select plan_hash || '+' from replay order by 1",
    )
    .fetch_all(&world.database.pool)
    .await
    .unwrap();
    assert_eq!(left, ["later", "licenses1", "metrics2", "running", "running+"]);
}

#[tokio::test]
async fn a_page_reads_its_rows_by_index_and_no_others() {
    let world = many().await;
    world.usage(5_000..5_060).await;
    for n in 0..60 {
        let event_id = format!("usage-{}", 5_000 + n);
        world.request(n, &[(event_id.as_str(), AttemptVerdict::Accepted)], None).await;
    }
    sqlx::query("analyze").execute(&world.database.pool).await.unwrap();
    // the number of rows here is too small for the planner to prefer an index by itself
    for (kind, table, most) in [
        (PruneKind::RejectPayloads, "reject", 500),
        (PruneKind::Attempts, "publication_request", 50),
    ] {
        // a connection of its own, for the counts include earlier statements of a connection
        let mut connection = sqlx::PgConnection::connect(&world.database.url).await.unwrap();
        let mut tx = connection.begin().await.unwrap();
        sqlx::raw_sql("set local enable_seqscan = off; set local enable_bitmapscan = off")
            .execute(&mut *tx)
            .await
            .unwrap();
        let before = noon() + days(9);
        let page = prune::due(&mut tx, kind, before, None, &[]).await.unwrap();
        assert_eq!(i64::try_from(page.due.len()).unwrap(), most);
        let scanned: i64 = sqlx::query_scalar(
            "select coalesce(sum(seq_tup_read), 0)::bigint from pg_stat_xact_user_tables where relname not in ('source', 'position', 'past_position')",
        )
        .fetch_one(&mut *tx)
        .await
        .unwrap();
        let fetched: i64 = sqlx::query_scalar(
            "select idx_tup_fetch from pg_stat_xact_user_tables where relname = $1",
        )
        .bind(table)
        .fetch_one(&mut *tx)
        .await
        .unwrap();
        assert!(
            scanned == 0 && fetched <= most + 1,
            "{kind}: {scanned} scanned, {fetched} fetched"
        );
    }
}
