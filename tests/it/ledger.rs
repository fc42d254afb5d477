//! The ledger's promises. A batch is one transaction, and its counts add up. Sequences are in
//! commit order without holes. A consumer that lost a partition cannot write.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sqlx::Row;
use tallyline::event::{Event, Fact, Payload, Topic};
use tallyline::ledger::{
    ActKind, Arrival, Baseline, Chain, Counts, Disposition, Landmark, Ledger, LedgerIdentity,
    LedgerSettings, NewAct, PartitionGenerations, PartitionLease, PassedReject, RecordError,
    Refusal, RejectState, RestoreEvidence, Subject, contents, entries, generations, landmarks,
    recoveries, rejects, restored, retirements, snapshots, sources,
};
use tokio::task::JoinSet;

use crate::support::eventually;
use crate::support::ledger::{
    DEPLOYMENT, arrival, build, event, lease_partition, ledger, moved, newest_landmark, noon,
    partition, record_batch, refused, register, registered_ledger,
};

/// A deadline, not a measurement.
const SOON: std::time::Duration = std::time::Duration::from_secs(30);

async fn number(ledger: &Ledger, query: &'static str) -> i64 {
    sqlx::query(query).fetch_one(&ledger.pool).await.unwrap().try_get(0).unwrap()
}

#[tokio::test]
async fn every_record_of_a_batch_is_counted_once_and_kept_where_it_belongs() {
    let (_database, ledger) = registered_ledger().await;
    let claim = lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let first = [arrival(0, build(DEPLOYMENT, 1)), arrival(1, build(DEPLOYMENT, 2))];
    let counts = record_batch(&ledger, &Chain::Live(claim.clone()), &first, 2).await.unwrap();
    assert_eq!(counts, Counts { records: 2, accepted: 2, ..Counts::default() });

    let mut told_otherwise = build(DEPLOYMENT, 2);
    let Payload::Build(other) = &mut told_otherwise.payload else { panic!("it is a build") };
    other.build_number = 9;
    let mut renamed = build(DEPLOYMENT, 1);
    let Payload::Build(other) = &mut renamed.payload else { panic!("it is a build") };
    other.template_name = "renamed".into();
    let mut again_otherwise = build(DEPLOYMENT, 3);
    let Payload::Build(other) = &mut again_otherwise.payload else { panic!("it is a build") };
    other.completed_at += chrono::TimeDelta::microseconds(1);
    let second = [
        arrival(2, renamed),
        arrival(3, told_otherwise),
        arrival(5, build(DEPLOYMENT, 3)),
        arrival(6, build(DEPLOYMENT, 3)),
        arrival(7, again_otherwise),
        refused(8, Disposition::Rejected),
        refused(9, Disposition::Held),
    ];
    let counts = record_batch(&ledger, &Chain::Live(moved(&claim, 2)), &second, 12).await.unwrap();
    assert_eq!(
        counts,
        Counts { records: 7, accepted: 1, duplicates: 2, conflicts: 2, rejects: 1, held: 1 }
    );

    let stored: Vec<(i64, String)> =
        sqlx::query_as("select log_offset, disposition from reject order by log_offset")
            .fetch_all(&ledger.pool)
            .await
            .unwrap();
    let stored: Vec<_> =
        stored.iter().map(|(offset, disposition)| (*offset, disposition.as_str())).collect();
    assert_eq!(stored, [(3, "conflict"), (7, "conflict"), (8, "rejected"), (9, "held")]);
    let facts: Vec<Event> = events(&ledger).await;
    assert_eq!(facts, [1, 2, 3].map(|n| build(DEPLOYMENT, n)), "events are as first seen");
    assert_eq!(number(&ledger, "select sum(records) from batch").await, 9);
    assert_eq!(number(&ledger, "select records from position").await, 9);
    let claim = lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    assert_eq!((claim.next_offset, claim.last.unwrap().offset), (12, 9));
}

async fn events(ledger: &Ledger) -> Vec<Event> {
    let entries =
        ledger.run(async |conn| entries::after(conn, 0, i64::MAX, 0).await).await.unwrap();
    let facts = entries.into_iter().flat_map(|entry| entry.facts);
    facts
        .filter_map(|fact| if let Fact::Event(event) = fact { Some(event) } else { None })
        .collect()
}

#[tokio::test]
async fn a_deployment_is_registered_once_also_by_several_at_once() {
    let (database, ledger) = ledger().await;
    let mut writers = JoinSet::new();
    for n in 0..4_i32 {
        // each with its own connections, like a process
        let own = Ledger::open(
            &LedgerSettings { url: database.url.clone(), connections: 2 },
            ledger.clock.clone(),
        )
        .unwrap();
        writers.spawn(async move {
            register(&own, &[DEPLOYMENT]).await;
            let claim = lease_partition(&own, partition(Topic::AgentUsage, n), 0).await.unwrap();
            let arrivals = [arrival(0, event(Topic::AgentUsage, n.unsigned_abs()))];
            record_batch(&own, &Chain::Live(claim), &arrivals, 1).await.unwrap();
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    let entries =
        ledger.run(async |conn| entries::after(conn, 0, i64::MAX, 0).await).await.unwrap();
    assert_eq!(entries.len(), 5);
    assert!(
        matches!(entries[0].facts[..], [Fact::Introduced { deployment: DEPLOYMENT, .. }]),
        "{:?}",
        entries[0]
    );
    assert!(entries[1..].iter().all(|entry| matches!(entry.facts[..], [Fact::Event(_)])));
}

#[tokio::test]
async fn a_consumer_without_the_lease_or_with_another_position_writes_nothing() {
    let (_database, ledger) = registered_ledger().await;
    let of = partition(Topic::WorkspaceBuilds, 3);
    let lost = lease_partition(&ledger, of, 40).await.unwrap();
    let holder = lease_partition(&ledger, of, 0).await.unwrap();
    assert_eq!(
        (holder.epoch, holder.next_offset),
        (lost.epoch + 1, 40),
        "the first claim's log start is the position"
    );
    let batch = [arrival(40, build(DEPLOYMENT, 1)), refused(41, Disposition::Rejected)];
    let stale = moved(&holder, 39);
    for claim in [&lost, &stale] {
        let outcome = record_batch(&ledger, &Chain::Live(claim.clone()), &batch, 42).await;
        assert!(
            matches!(outcome, Err(RecordError::Fenced(partition)) if partition == of),
            "{outcome:?}"
        );
    }
    assert_eq!(events(&ledger).await, []);
    let written = "select (select count(*) from reject) + (select count(*) from batch where kind = 'log') + (select records from position)";
    assert_eq!(number(&ledger, written).await, 0);
    // a fenced batch takes no sequence
    let before = ledger.run(snapshots::head).await.unwrap().number;
    record_batch(&ledger, &Chain::Live(holder), &batch, 42).await.unwrap();
    assert_eq!(ledger.run(snapshots::head).await.unwrap().number, before + 1);
}

#[tokio::test]
async fn the_same_events_on_two_partitions_at_once_are_accepted_once() {
    let (_database, ledger) = registered_ledger().await;
    let mut writers = JoinSet::new();
    for n in 0..4_i32 {
        let ledger = ledger.clone();
        writers.spawn(async move {
            let claim =
                lease_partition(&ledger, partition(Topic::WorkspaceBuilds, n), 0).await.unwrap();
            let order: Vec<u32> =
                if n % 2 == 0 { (0..200).collect() } else { (0..200).rev().collect() };
            let batch: Vec<_> =
                (0..).zip(order).map(|(offset, n)| arrival(offset, build(DEPLOYMENT, n))).collect();
            record_batch(&ledger, &Chain::Live(claim), &batch, 200).await.unwrap()
        });
    }
    let mut counts = Counts::default();
    while let Some(ended) = writers.join_next().await {
        counts = counts + ended.unwrap();
    }
    assert_eq!(
        counts,
        Counts { records: 800, accepted: 200, duplicates: 600, ..Counts::default() }
    );
    assert_eq!(events(&ledger).await.len(), 200);
}

/// When a batch was submitted and acknowledged, in one order over all writers.
struct Written {
    begun: u64,
    ended: u64,
    sequence: i64,
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_are_commit_order_without_holes_under_four_writers() {
    let (_database, ledger) = registered_ledger().await;
    let ticks = Arc::new(AtomicU64::new(0));
    let mut writers = JoinSet::new();
    for n in 0..4 {
        writers.spawn(write_60_batches(ledger.clone(), n, Arc::clone(&ticks)));
    }
    // A concurrent reader sees only the next sequence each time.
    let mut seen = 0;
    let mut written = Vec::new();
    loop {
        for entry in
            ledger.run(async |conn| entries::after(conn, seen, i64::MAX, 0).await).await.unwrap()
        {
            seen += 1;
            assert_eq!(entry.sequence, seen, "a hole, or a batch that was committed late");
        }
        match writers.try_join_next() {
            Some(ended) => written.extend(ended.unwrap()),
            None if writers.is_empty() => break,
            None => tokio::task::yield_now().await,
        }
    }
    // Two introductions, 4 × 60 batches; the fenced attempts took none.
    assert_eq!((written.len(), ledger.run(snapshots::head).await.unwrap().number), (240, 242));
    for one in &written {
        for other in &written {
            assert!(
                one.ended > other.begun || one.sequence < other.sequence,
                "acknowledged before the other began, yet later in order"
            );
        }
    }
}

/// Writes 60 batches of 5 builds. After each comes a fenced attempt, whose transaction is rolled
/// back amid the others'.
async fn write_60_batches(ledger: Ledger, n: u32, ticks: Arc<AtomicU64>) -> Vec<Written> {
    let of = partition(Topic::WorkspaceBuilds, i32::try_from(n).unwrap());
    let mut claim = lease_partition(&ledger, of, 0).await.unwrap();
    let mut written = Vec::new();
    for batch in 0..60_u32 {
        let offset = i64::from(batch) * 5;
        let arrivals: Vec<_> = (0..5_u32)
            .map(|i| {
                arrival(
                    offset + i64::from(i),
                    event(Topic::WorkspaceBuilds, n * 1000 + batch * 5 + i),
                )
            })
            .collect();
        let begun = ticks.fetch_add(1, Ordering::SeqCst);
        let counts = record_batch(&ledger, &Chain::Live(claim.clone()), &arrivals, offset + 5)
            .await
            .unwrap();
        let ended = ticks.fetch_add(1, Ordering::SeqCst);
        assert_eq!((counts.records, counts.accepted), (5, 5));
        let fenced = record_batch(
            &ledger,
            &Chain::Live(PartitionLease { epoch: 0, ..claim.clone() }),
            &arrivals,
            offset + 5,
        )
        .await;
        assert!(matches!(fenced, Err(RecordError::Fenced(_))), "{fenced:?}");
        let sequence = sqlx::query(
            "select sequence from batch where topic = $1 and partition = $2 and first_offset = $3",
        )
        .bind(of.topic.name())
        .bind(of.partition)
        .bind(offset)
        .fetch_one(&ledger.pool)
        .await
        .unwrap()
        .try_get(0)
        .unwrap();
        written.push(Written { begun, ended, sequence });
        claim = moved(&claim, offset + 5);
    }
    written
}

#[tokio::test]
async fn a_transaction_that_a_failed_call_left_open_does_not_reach_the_next_call() {
    let (database, _ledger) = ledger().await;
    let settings = LedgerSettings { url: database.url.clone(), connections: 1 };
    let ledger = Ledger::open(&settings, tallyline::clock::Clock::system()).unwrap();
    for begin in ["begin read only", "begin"] {
        let left_open = ledger.run(async |conn| {
            sqlx::raw_sql(begin).execute(conn).await?;
            Err::<(), _>(sqlx::Error::RowNotFound)
        });
        left_open.await.unwrap_err();
        let epoch =
            lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap().epoch;
        let stored: i64 = sqlx::query_scalar("select epoch from position")
            .fetch_one(&database.pool)
            .await
            .unwrap();
        assert_eq!(stored, epoch, "{begin}: the write is committed");
    }
}

#[tokio::test]
async fn a_deployment_is_introduced_once_and_delays_no_batch_of_others() {
    let (database, ledger) = ledger().await;
    let baseline =
        Baseline { until: noon(), creations: Vec::new(), started: vec![uuid::Uuid::from_u128(7)] };
    let mut busy = database.pool.begin().await.unwrap();
    sqlx::query("lock table workspace_first_start in share mode")
        .execute(&mut *busy)
        .await
        .unwrap();
    let introduction = || {
        let (ledger, baseline) = (ledger.clone(), baseline.clone());
        tokio::spawn(async move {
            ledger
                .run(async |conn| {
                    sources::register(conn, DEPLOYMENT, noon(), Some(&baseline), ledger.clock.now())
                        .await
                })
                .await
                .unwrap()
        })
    };
    let rivals = [introduction(), introduction()];
    let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    eventually(SOON, "one waits for the table, the other for it", || async {
        number(&ledger, waiting).await == 2
    })
    .await;

    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Accept,
        subject: Subject::Named("a test"),
        reason: "",
        detail: serde_json::json!({}),
    };
    tokio::time::timeout(
        SOON,
        ledger.run(async |conn| rejects::begin_acts(conn, &[act], ledger.clock.now()).await),
    )
    .await
    .expect("another batch takes its sequence meanwhile")
    .unwrap();
    busy.rollback().await.unwrap();
    let [one, other] = rivals;
    assert_eq!(one.await.unwrap(), other.await.unwrap());
    assert_eq!(number(&ledger, "select count(*) from batch where kind = 'source'").await, 1);
    assert_eq!(number(&ledger, "select count(distinct sequence) from batch").await, 2);
}

#[tokio::test]
async fn large_tables_are_estimated_from_a_part_and_marked_as_such() {
    let (_database, ledger) = ledger().await;
    let source = ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
        })
        .await
        .unwrap();
    // about 30 MB: every fifth event is a seat count
    sqlx::query(
        "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at)
         select $1, 'usage-' || number, 1, number, '\\x00',
             case when number % 5 = 0 then 'hb_ai_seats_v1' else 'dc_managed_agents_v1' end, 1, $2
         from generate_series(1, 200000) as number",
    )
    .bind(source.id)
    .bind(noon())
    .execute(&ledger.pool)
    .await
    .unwrap();
    let counts = |contents: tallyline::ledger::Contents| -> Vec<(String, i64, bool)> {
        contents.events.into_iter().map(|row| (row.event_type, row.events, row.estimated)).collect()
    };
    let exact = counts(
        ledger
            .run(async |conn| {
                contents::read_counting(conn, 64 * 1024 * 1024, ledger.clock.now()).await
            })
            .await
            .unwrap(),
    );
    assert_eq!(
        exact,
        [
            ("dc_managed_agents_v1".to_owned(), 160_000, false),
            ("hb_ai_seats_v1".to_owned(), 40_000, false)
        ]
    );
    let about = counts(
        ledger
            .run(async |conn| {
                contents::read_counting(conn, 8 * 1024 * 1024, ledger.clock.now()).await
            })
            .await
            .unwrap(),
    );
    for ((_, estimate, estimated), (event_type, events, _)) in about.iter().zip(&exact) {
        // a third of about 3,000 blocks: the standard deviation is below 3 %
        assert!(
            *estimated && (estimate - events).abs() * 5 < *events,
            "{event_type}: {estimate} for {events}"
        );
    }
    assert_eq!(about.len(), 2);
}

#[tokio::test]
async fn data_that_postgres_cannot_store_is_refused_and_not_retried() {
    let (_database, ledger) = registered_ledger().await;
    let claim = lease_partition(&ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    // too long for an index entry, and this text cannot be compressed
    let long: String = (0..128).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
    for id in ["with\0NUL", &long] {
        let mut event = event(Topic::AgentUsage, 1);
        let Payload::Usage(usage) = &mut event.payload else { panic!("it is usage") };
        usage.id = id.to_owned();
        let outcome =
            record_batch(&ledger, &Chain::Live(claim.clone()), &[arrival(0, event)], 1).await;
        assert!(matches!(outcome, Err(RecordError::Refused(_))), "{outcome:?}");
    }
    record_batch(&ledger, &Chain::Live(claim), &[arrival(0, event(Topic::AgentUsage, 1))], 1)
        .await
        .unwrap();
}

#[tokio::test]
async fn sessions_that_began_read_only_are_not_kept() {
    let (database, _) = ledger().await;
    let settings = LedgerSettings { url: database.url.clone(), connections: 3 };
    let ledger = Ledger::open(&settings, tallyline::clock::Clock::system()).unwrap();
    let sessions_begin = async |read_only: &str| {
        let statement = "do $$ begin execute format('alter database %I set default_transaction_read_only = %L', current_database(), '";
        let statement = format!("{statement}{read_only}'); end $$");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&database.pool).await.unwrap();
    };
    sessions_begin("on").await;
    let take = async |number| {
        let partition = partition(Topic::AgentUsage, number);
        lease_partition(&ledger, partition, 0).await
    };
    let claims = futures::future::join_all((0..3).map(&take)).await;
    assert!(claims.iter().all(Result::is_err), "{claims:?}");
    sessions_begin("off").await;
    for number in 0..3 {
        let claimed = || async { take(number).await.is_ok() };
        eventually(SOON, "it can be written", claimed).await;
    }
}

/// As after a second restore of one backup: the ledger has the incarnation of the first restore.
#[tokio::test]
async fn a_backup_that_is_restored_twice_is_detected_twice_by_each_landmark_and_mark() {
    let (_database, ledger) = registered_ledger().await;
    let place = partition(Topic::AgentUsage, 0);
    let claim = lease_partition(&ledger, place, 0).await.unwrap();
    record_batch(&ledger, &Chain::Live(claim), &[arrival(0, event(Topic::AgentUsage, 1))], 1)
        .await
        .unwrap();
    let backed_up = ledger.run(generations::all).await.unwrap();
    let landmark = async || newest_landmark(&ledger).await;
    let first = landmark().await;
    let gone = Landmark { recorded_at: first.recorded_at + chrono::TimeDelta::seconds(1), ..first };
    assert!(
        ledger
            .run(async |conn| restored::record_detected(
                conn,
                &RestoreEvidence::Batch(gone),
                ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    let recovered = ledger.run(generations::all).await.unwrap();
    let identity = async |landmark: &Landmark| {
        ledger
            .run(async |conn| landmarks::head_and_identity(conn, Some(landmark)).await)
            .await
            .unwrap()
            .1
    };
    assert_eq!(identity(&first).await, LedgerIdentity::Another);
    let of_recovered = landmark().await;

    sqlx::query("with gone as (delete from past_incarnation) update ledger set incarnation = $1")
        .bind(backed_up.incarnation)
        .execute(&ledger.pool)
        .await
        .unwrap();
    assert_eq!(identity(&of_recovered).await, LedgerIdentity::Restored);
    let mark = |generations, next_offset| RestoreEvidence::Position {
        generations,
        partition: place,
        next_offset,
        read_until: None,
        marked: vec![recovered.incarnation],
    };
    let restored = async |generations, next_offset| {
        ledger
            .run(async |conn| restored::is_restored(conn, &mark(generations, next_offset)).await)
            .await
            .unwrap()
    };
    let of_later_generation = PartitionGenerations { ended: backed_up.ended + 1, ..backed_up };
    assert!(
        restored(recovered, 1).await
            && restored(of_later_generation, 1).await
            && restored(backed_up, 2).await
    );
    assert!(!restored(backed_up, 1).await);
    assert!(
        ledger
            .run(async |conn| restored::record_detected(
                conn,
                &mark(recovered, 1),
                ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    assert!(
        !ledger
            .run(async |conn| restored::record_detected(
                conn,
                &RestoreEvidence::Batch(of_recovered),
                ledger.clock.now()
            )
            .await)
            .await
            .unwrap(),
        "it is known"
    );
    assert_eq!(identity(&of_recovered).await, LedgerIdentity::Another);
    assert!(!restored(recovered, 9).await && !restored(of_later_generation, 9).await);
}

#[tokio::test]
async fn rejects_stay_open_where_the_log_may_have_lost_their_resubmission() {
    let (_database, ledger) = registered_ledger().await;
    let place = partition(Topic::AgentUsage, 0);
    let claim = lease_partition(&ledger, place, 0).await.unwrap();
    let refused = Arrival {
        event: Err(Refusal::unregistered(DEPLOYMENT)),
        ..arrival(0, event(Topic::AgentUsage, 1))
    };
    record_batch(&ledger, &Chain::Live(claim), &[refused], 1).await.unwrap();
    let reject: i64 = number(&ledger, "select max(id) from reject").await;
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Resubmit,
        subject: Subject::Reject(reject),
        reason: "a test",
        detail: serde_json::json!({}),
    };
    let acts = ledger
        .run(async |conn| rejects::begin_acts(conn, &[act], ledger.clock.now()).await)
        .await
        .unwrap();
    let generations = ledger.run(generations::all).await.unwrap();
    let passed = [PassedReject { id: reject, act_id: acts[0], place: Some((place, 1)) }];
    let end = async |generations| {
        ledger
            .run(async |conn| {
                rejects::end(
                    conn,
                    &passed,
                    &[RejectState::Open],
                    RejectState::Resubmitted,
                    generations,
                )
                .await
            })
            .await
            .unwrap()
    };
    assert!(
        end(PartitionGenerations { ended: generations.ended + 1, ..generations }).await.is_empty()
    );
    // a life that is about to end is waited for
    let mut recovery = ledger.pool.begin().await.unwrap();
    sqlx::query("select from position for update").execute(&mut *recovery).await.unwrap();
    sqlx::query("insert into past_position select topic, partition, 1, 0, 1, 1, $1 from position")
        .bind(acts[0])
        .execute(&mut *recovery)
        .await
        .unwrap();
    let recovered = async {
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        eventually(SOON, "it waits", || async { number(&ledger, waits).await == 1 }).await;
        recovery.commit().await.unwrap();
    };
    let (ended, ()) = tokio::join!(end(generations), recovered);
    assert!(ended.is_empty());
    assert_eq!(end(ledger.run(generations::all).await.unwrap()).await, [reject]);
}

#[tokio::test]
async fn a_recovery_that_is_not_complete_does_not_change_the_queue() {
    let (_database, ledger) = ledger().await;
    let [read, unread] = [0, 1].map(|number| partition(Topic::AgentUsage, number));
    register(&ledger, &[DEPLOYMENT]).await;
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Retire,
        subject: Subject::Named("d1"),
        reason: "no collector reads it",
        detail: serde_json::json!({}),
    };
    assert!(
        ledger
            .run(async |conn| retirements::retire(conn, DEPLOYMENT, &act, ledger.clock.now()).await)
            .await
            .unwrap()
    );
    let claim = lease_partition(&ledger, read, 0).await.unwrap();
    record_batch(&ledger, &Chain::Live(claim), &[arrival(0, event(Topic::AgentUsage, 1))], 1)
        .await
        .unwrap();
    let landmark = newest_landmark(&ledger).await;
    let gone =
        Landmark { recorded_at: landmark.recorded_at + chrono::TimeDelta::seconds(1), ..landmark };
    assert!(
        ledger
            .run(async |conn| restored::record_detected(
                conn,
                &RestoreEvidence::Batch(gone),
                ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    let id = ledger.run(recoveries::open).await.unwrap().unwrap().id;
    ledger
        .run(async |conn| {
            recoveries::set_targets(conn, id, &[(read, 1), (unread, 3)], ledger.clock.now()).await
        })
        .await
        .unwrap();
    let mut other = ledger.pool.begin().await.unwrap();
    assert_eq!(
        sqlx::query("select from publication for update")
            .fetch_all(&mut *other)
            .await
            .unwrap()
            .len(),
        1
    );
    let closed = tokio::time::timeout(
        std::time::Duration::from_secs(8),
        ledger.run(async |conn| recoveries::close(conn, id, ledger.clock.now()).await),
    )
    .await;
    assert!(!closed.expect("it waits for no publication").unwrap());
    other.rollback().await.unwrap();
    let waits_for = ledger.run(recoveries::open).await.unwrap().unwrap().records_to_read;
    assert_eq!(waits_for, 3, "an unread partition must be read, too");
    let claim = lease_partition(&ledger, unread, 0).await.unwrap();
    record_batch(&ledger, &Chain::Live(claim), &[arrival(0, event(Topic::AgentUsage, 2))], 3)
        .await
        .unwrap();
    assert_eq!(ledger.run(recoveries::open).await.unwrap().unwrap().records_to_read, 0);
    assert!(
        ledger
            .run(async |conn| recoveries::close(conn, id, ledger.clock.now()).await)
            .await
            .unwrap()
    );
    assert_eq!(
        number(&ledger, "select count(*) from publication where state = 'pending' and unanswered")
            .await,
        2
    );
}
