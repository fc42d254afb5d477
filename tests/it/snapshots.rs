//! Snapshots in pieces: only changed pieces are written, by one process at a time, and the saved
//! pieces are always those of one sequence.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::TimeDelta;
use tallyline::event::{Payload, Topic};
use tallyline::ledger::{
    ActKind, Chain, Ledger, NewAct, Sequence, StatementError, Subject, snapshots as saved,
};
use tallyline::projection::{self, Folded, ProjectionSettings};
use tallyline::stages::{LicensesState, MetricsState, Stage};

use crate::projection::{Running, SETTINGS, SOON, snapshots, write, write_one};
use crate::support::eventually;
use crate::support::ledger::{
    DEPLOYMENT, arrival, caught_up_to, lease_partition, ledger, noon, partition, record_batch,
    register, registered_ledger, usage,
};
use crate::support::snapshots::{Pieces, load, pieces, rules, save};

/// Starts agents, one in each of these hours, in one batch.
async fn agents(ledger: &Ledger, hours: std::ops::Range<u32>) {
    let claim = lease_partition(ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let numbers = hours.map(|hour| {
        // one agent
        let mut event = usage(DEPLOYMENT, hour * 12);
        let Payload::Usage(usage) = &mut event.payload else { panic!("it is usage") };
        usage.created_at = noon() + TimeDelta::hours(i64::from(hour));
        event
    });
    let arrivals: Vec<_> =
        (claim.next_offset..).zip(numbers).map(|(offset, event)| arrival(offset, event)).collect();
    let next = claim.next_offset + i64::try_from(arrivals.len()).unwrap();
    record_batch(ledger, &Chain::Live(claim), &arrivals, next).await.unwrap();
}

/// Folds to the ledger's end and saves.
async fn fold_and_save<S: Stage>(ledger: &Ledger) -> i64 {
    let running = Running::<S>::start(ledger, SETTINGS);
    let end = ledger.run(saved::head).await.unwrap().number;
    running.reaches(end).await;
    running.end().await;
    end
}

/// Number and bytes of the versions that the snapshot at this sequence wrote.
async fn written<S: Stage>(ledger: &Ledger, sequence: i64) -> (i64, i64) {
    sqlx::query_as(
        "select count(*), coalesce(sum(length(content)), 0) from snapshot_piece where stage = $1 and sequence = $2",
    )
    .bind(S::NAME)
    .bind(sequence)
    .fetch_one(&ledger.pool)
    .await
    .unwrap()
}

async fn versions(ledger: &Ledger) -> i64 {
    sqlx::query_scalar("select count(*) from snapshot_piece").fetch_one(&ledger.pool).await.unwrap()
}

#[tokio::test]
async fn a_save_after_one_more_event_writes_as_much_with_any_history() {
    let (_database, ledger) = registered_ledger().await;
    let mut sizes = Vec::new();
    for (history, next) in [(0..40, 40), (41..900, 900)] {
        agents(&ledger, history).await;
        fold_and_save::<LicensesState>(&ledger).await;
        agents(&ledger, next..next + 1).await;
        let sequence = fold_and_save::<LicensesState>(&ledger).await;
        sizes.push(written::<LicensesState>(&ledger, sequence).await);
    }
    assert_eq!(sizes[0].0, 1, "one hour changed");
    assert_eq!(sizes[0], sizes[1]);
    // The pieces of the deployments' licenses and of 901 hours. The older kept snapshot lacks the
    // last one.
    let of_last: Pieces = load::<LicensesState>(&ledger).await.unwrap().1;
    assert_eq!(versions(&ledger).await, i64::try_from(of_last.len()).unwrap());
    assert_eq!(of_last.keys().filter(|name| name.contains("/agents/")).count(), 901);
}

#[tokio::test]
async fn versions_that_no_kept_snapshot_needs_are_deleted() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let first = fold_and_save::<MetricsState>(&ledger).await;
    let all = written::<MetricsState>(&ledger, first).await.0;
    assert!(all >= 2, "the introduction and the creations");
    // the same series each time
    for _ in 0..4 {
        write_one(&ledger, 1).await;
        write_one(&ledger, 7 * 12 + 1).await;
        fold_and_save::<MetricsState>(&ledger).await;
    }
    let kept = snapshots::<MetricsState>(&ledger.pool).await;
    assert_eq!(kept.len(), 2);
    let changed = written::<MetricsState>(&ledger, kept[1]).await.0;
    let (_, newest) = load::<MetricsState>(&ledger).await.unwrap();
    assert!(versions(&ledger).await <= i64::try_from(newest.len()).unwrap() + changed);
}

#[tokio::test]
async fn a_removed_piece_is_not_in_later_snapshots() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let at = ledger.run(saved::head).await.unwrap();
    let name = |n: u8| format!("{DEPLOYMENT}/agents/{n}");
    let both: Pieces = [(name(1), vec![1]), (name(2), vec![2])].into();
    let one: Pieces = [(name(2), vec![3])].into();
    for (back, pieces) in [(2, &both), (1, &one)] {
        write_one(&ledger, back + 1).await;
        let at = Sequence { number: at.number + 2 - i64::from(back), ..at };
        assert!(save::<LicensesState>(&ledger, at, pieces).await);
    }
    assert_eq!(load::<LicensesState>(&ledger).await.unwrap().1, one);
    assert_eq!(versions(&ledger).await, 4, "two versions, a new one and a removal");
    write_one(&ledger, 5).await;
    let at = Sequence { number: at.number + 2, ..at };
    assert!(save::<LicensesState>(&ledger, at, &one).await);
    assert_eq!(load::<LicensesState>(&ledger).await.unwrap(), (at, one));
    assert_eq!(versions(&ledger).await, 2, "the kept two versions of one piece");
}

#[tokio::test]
async fn one_process_saves_at_a_time() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let incarnation = ledger.run(saved::head).await.unwrap().incarnation;
    ledger
        .run(async |conn| {
            let first = saved::begin(conn, rules::<MetricsState>(), incarnation).await?;
            assert!(first.is_some());
            let other = ledger.run(async |conn| {
                let second = saved::begin(conn, rules::<MetricsState>(), incarnation);
                assert!(second.await?.is_none());
                let other_stage = saved::begin(conn, rules::<LicensesState>(), incarnation);
                assert!(other_stage.await?.is_some());
                Ok::<_, StatementError>(())
            });
            other.await?;
            drop(first);
            Ok::<_, StatementError>(())
        })
        .await
        .unwrap();
    assert_eq!(fold_and_save::<MetricsState>(&ledger).await, 2);
    assert_eq!(snapshots::<MetricsState>(&ledger.pool).await, [2]);
}

#[tokio::test]
async fn a_second_process_does_not_save_within_the_interval() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let settings = ProjectionSettings { snapshot: Duration::from_millis(100), ..SETTINGS };
    let both = [(); 2].map(|()| Running::<MetricsState>::start(&ledger, settings));
    let saves = || snapshots::<MetricsState>(&ledger.pool);
    eventually(SOON, "a snapshot is saved", || async { saves().await == [2] }).await;
    // their clock does not move: the snapshot stays younger than the interval
    for n in [2, 4, 8] {
        write_one(&ledger, n).await;
        for one in &both {
            eventually(SOON, "it is folded", || async { caught_up_to(&one.view) > 2 }).await;
        }
        assert_eq!(saves().await, [2]);
    }
    for one in &both {
        one.reaches(5).await;
    }
    ledger.clock.set(noon() + TimeDelta::seconds(1));
    eventually(SOON, "the next one is saved", || async { saves().await == [2, 5] }).await;
    for one in both {
        one.end().await;
    }
    assert_eq!(saves().await, [2, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_savers_during_writing_leave_the_pieces_of_one_sequence() {
    let (_database, ledger) = ledger().await;
    let settings = ProjectionSettings { snapshot: Duration::ZERO, ..SETTINGS };
    for batches in [0..6, 6..12] {
        let savers = [(); 3].map(|()| Running::<LicensesState>::start(&ledger, settings));
        write(&ledger, batches).await;
        for saver in savers {
            saver.end().await;
            let (at, found) = load::<LicensesState>(&ledger).await.unwrap();
            let folded: Folded<LicensesState> =
                projection::fold_to(&ledger, at.number).await.unwrap();
            assert!(found == pieces(&folded.state), "snapshot at {at}");
        }
    }
}

#[tokio::test]
async fn an_older_state_is_not_saved_over_a_newer_one() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let head = ledger.run(saved::head).await.unwrap();
    let newer = Sequence { number: head.number + 5, ..head };
    let folded: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    assert!(save::<MetricsState>(&ledger, newer, &pieces(&folded.state)).await);
    fold_and_save::<MetricsState>(&ledger).await;
    assert_eq!(snapshots::<MetricsState>(&ledger.pool).await, [newer.number]);
}

#[tokio::test]
async fn an_unreadable_piece_restarts_the_fold_and_is_replaced() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    fold_and_save::<MetricsState>(&ledger).await;
    for broken in ["content = 'x'", "piece = piece || '0x'"] {
        let broken = sqlx::AssertSqlSafe(format!(
            "update snapshot_piece set {broken} where piece like '%/creations/%' and content is not null"
        ));
        assert!(sqlx::query(broken).execute(&ledger.pool).await.unwrap().rows_affected() > 0);
        write_one(&ledger, 2).await;
        let running = Running::<MetricsState>::start(&ledger, SETTINGS);
        let end = ledger.run(saved::head).await.unwrap().number;
        running.reaches(end).await;
        let from_zero: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
        assert_eq!(running.pieces(), pieces(&from_zero.state));
        running.end().await;
        let (at, replaced) = load::<MetricsState>(&ledger).await.unwrap();
        assert_eq!((at, replaced), (from_zero.sequence, pieces(&from_zero.state)));
    }
}

#[tokio::test]
async fn a_snapshot_without_one_of_its_pieces_restarts_the_fold_and_is_replaced() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    fold_and_save::<MetricsState>(&ledger).await;
    let removed = "delete from snapshot_piece where piece like '%/creations/%'";
    assert!(sqlx::query(removed).execute(&ledger.pool).await.unwrap().rows_affected() > 0);
    write_one(&ledger, 2).await;
    fold_and_save::<MetricsState>(&ledger).await;
    let from_zero: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let replaced = load::<MetricsState>(&ledger).await.unwrap();
    assert_eq!(replaced, (from_zero.sequence, pieces(&from_zero.state)));
}

#[tokio::test]
async fn a_snapshot_that_the_database_refuses_does_not_keep_the_fold_from_its_start() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    fold_and_save::<MetricsState>(&ledger).await;
    sqlx::query("alter table snapshot_piece rename to elsewhere")
        .execute(&ledger.pool)
        .await
        .unwrap();
    write_one(&ledger, 2).await;
    assert_eq!(fold_and_save::<MetricsState>(&ledger).await, 3);
}

#[tokio::test]
async fn a_rebuild_does_not_wait_for_a_save_which_then_saves_nothing() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    fold_and_save::<MetricsState>(&ledger).await;
    write_one(&ledger, 2).await;
    let head = ledger.run(saved::head).await.unwrap();
    let now = ledger.clock.now();
    let is_saved: Result<bool, StatementError> = ledger
        .run(async |conn| {
            let rules = rules::<MetricsState>();
            let mut saver = saved::begin(conn, rules, head.incarnation).await?.unwrap();
            let piece = (format!("{DEPLOYMENT}/creations/0"), Some(vec![1]));
            saver.write(head.number, vec![piece]).await?;
            let act = NewAct {
                actor: "sre-1",
                act: ActKind::Rebuild,
                subject: Subject::Named(MetricsState::NAME),
                reason: "",
                detail: serde_json::json!({}),
            };
            let rebuild =
                ledger.run(async |conn| saved::rebuild(conn, MetricsState::NAME, &act, now).await);
            tokio::time::timeout(Duration::from_secs(8), rebuild).await.unwrap()?;
            saver.finish(head.number, 2, now).await
        })
        .await;
    assert!(!is_saved.unwrap());
    assert_eq!(versions(&ledger).await, 0);
}

/// Lines of the log on this thread.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_fold_from_zero_logs_its_progress() {
    let (_database, ledger) = ledger().await;
    // more batches than a page has
    for n in 0..510 {
        write_one(&ledger, n).await;
    }
    let (lines, end) = (Lines::default(), ledger.run(saved::head).await.unwrap().number);
    let writer = lines.clone();
    let subscriber =
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let settings = ProjectionSettings { progress: Duration::ZERO, ..SETTINGS };
    let running = Running::<MetricsState>::start(&ledger, settings);
    running.reaches(end).await;
    running.end().await;
    let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    for words in [
        r#"no usable snapshot, folding from zero stage="metrics""#.to_owned(),
        format!(r#"folding stage="metrics" batches=500 of={end}"#),
        format!(r#"folding stage="metrics" batches={end} of={end}"#),
    ] {
        assert!(lines.contains(&words), "{words:?} is not in {lines}");
    }
}

#[tokio::test]
async fn snapshots_are_saved_during_a_run_and_only_after_new_batches() {
    let (_database, ledger) = ledger().await;
    register(&ledger, &[DEPLOYMENT]).await;
    let running = Running::<LicensesState>::start(
        &ledger,
        ProjectionSettings { snapshot: Duration::ZERO, ..SETTINGS },
    );
    for (n, sequence) in [(1, 2), (2, 3), (4, 4)] {
        write_one(&ledger, n).await;
        eventually(SOON, "a snapshot is kept", || async {
            snapshots::<LicensesState>(&ledger.pool).await.last() == Some(&sequence)
        })
        .await;
    }
    assert_eq!(snapshots::<LicensesState>(&ledger.pool).await, [3, 4]);
    running.end().await;
    assert_eq!(snapshots::<LicensesState>(&ledger.pool).await, [3, 4]);
}
