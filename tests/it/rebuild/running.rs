//! Rebuilds correct wrong numbers, in one step and in every process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::json;
use tallyline::event::Topic;
use tallyline::ledger::{ActKind, Chain, Ledger, NewAct, Subject, snapshots};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::{
    Actor, OperationError, Operations, RebuildExecution, RebuildPlan, RebuildRequest, RebuildStage,
};
use tallyline::projection::{self, Folded, Projection, ProjectionSettings, View};
use tallyline::stages::{LicensesState, MetricsState, Stage};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{
    DEPLOYMENT, act, arrival, ask, build, caught_up_to, lease_partition, partition, record_batch,
    registered_ledger,
};
use crate::support::process::run_tallyline;
use crate::support::snapshots::{Pieces, change_creations, pieces};
use crate::support::tables::tables;
use crate::support::{self, Database, eventually};

use super::{SOON, Site, json_of};

/// A fold that runs as in a serving process.
struct Running<S> {
    view: View<S>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl<S: Stage> Running<S> {
    fn start(ledger: &Ledger) -> Self {
        let settings = ProjectionSettings {
            poll: Duration::from_millis(50),
            snapshot: Duration::from_secs(3600),
            last_snapshot: SOON,
            progress: Duration::from_secs(3600),
        };
        let projection = Projection::<S>::new(ledger.clone(), settings);
        let (view, stop) = (projection.view(), CancellationToken::new());
        let signal = stop.clone();
        Running {
            view,
            stop,
            task: tokio::spawn(async move { projection.run(&signal).await.unwrap() }),
        }
    }

    /// Waits until everything that the ledger has now is folded.
    async fn caught_up(&self, ledger: &Ledger) {
        let end = ledger.run(snapshots::head).await.unwrap().number;
        eventually(SOON, "the folds are at the ledger's end", || async {
            caught_up_to(&self.view) >= end
        })
        .await;
    }

    fn pieces(&self) -> Pieces {
        self.view.with(|state, _| pieces(state)).unwrap()
    }

    /// Ends in order, so that a snapshot is saved.
    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

async fn builds(ledger: &Ledger, numbers: std::ops::Range<u32>) {
    let claim = lease_partition(ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let arrivals: Vec<_> = (claim.next_offset..)
        .zip(numbers)
        .map(|(offset, n)| arrival(offset, build(DEPLOYMENT, n)))
        .collect();
    let next_offset = claim.next_offset + i64::try_from(arrivals.len()).unwrap();
    record_batch(ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
}

/// Changes the number of creations in the first series of the newest snapshot.
async fn tamper(ledger: &Ledger, change: impl Fn(u64) -> u64) -> (u64, u64) {
    let (_, mut pieces) = support::snapshots::load::<MetricsState>(ledger).await.unwrap();
    let (name, before, after) = change_creations(&mut pieces, change);
    sqlx::query("update snapshot_piece set content = $1 where stage = 'metrics' and piece = $2")
        .bind(&pieces[&name])
        .bind(name)
        .execute(&ledger.pool)
        .await
        .unwrap();
    (before, after)
}

fn operations(ledger: &Ledger) -> Operations {
    support::ledger::operations(
        ledger,
        &Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()),
    )
}

fn plain(stage: RebuildStage) -> RebuildRequest {
    RebuildRequest {
        stage,
        rules: None,
        license: None,
        without: Vec::new(),
        source: None,
        at: None,
    }
}

async fn execute(
    ledger: &Ledger,
    plan: &RebuildPlan,
    allow_decrease: bool,
) -> Result<String, OperationError> {
    let hash = plan.hash.clone().unwrap();
    let request = RebuildExecution { rebuild: plain(RebuildStage::Metrics), hash, allow_decrease };
    let actor = Actor { name: "sre-1".into(), reason: "the snapshot was changed by hand".into() };
    act(&operations(ledger), &request, &actor).await.map(|rebuilt| rebuilt.done)
}

/// A ledger whose newest snapshot of the metrics is wrong, and a process that started from it.
/// Returns the true and the shown number.
async fn wrong(
    change: impl Fn(u64) -> u64,
) -> (Database, Ledger, Running<MetricsState>, (u64, u64)) {
    let (database, ledger) = registered_ledger().await;
    builds(&ledger, 0..200).await;
    let first = Running::<MetricsState>::start(&ledger);
    first.caught_up(&ledger).await;
    first.end().await;
    let numbers = tamper(&ledger, change).await;
    let running = Running::start(&ledger);
    builds(&ledger, 200..210).await;
    running.caught_up(&ledger).await;
    (database, ledger, running, numbers)
}

#[tokio::test]
async fn a_rebuild_reports_wrong_series_and_corrects_them_in_running_and_later_processes() {
    let (_database, ledger, running, (truth, value)) = wrong(|value| value - 1).await;
    let (sequence, stale) = support::snapshots::load::<MetricsState>(&ledger).await.unwrap();
    let before = tables(&ledger.pool).await;
    let plan = ask(&operations(&ledger), &plain(RebuildStage::Metrics)).await.unwrap();
    assert!(tables(&ledger.pool).await == before, "a plan writes nothing");
    let numbers: Vec<_> = plan
        .differences
        .iter()
        .map(|one| (one.what.as_str(), one.rebuilt.unwrap().count - one.shown.unwrap().count))
        .collect();
    assert_eq!(
        (plan.differs, plan.falling, numbers),
        (true, 0, vec![("coderd_workspace_creation_total", truth - value)])
    );
    // events in between raise both sides: the effect is the same
    builds(&ledger, 210..230).await;
    assert_eq!(
        ask(&operations(&ledger), &plain(RebuildStage::Metrics)).await.unwrap().hash,
        plan.hash
    );

    execute(&ledger, &plan, false).await.unwrap();
    builds(&ledger, 230..240).await;
    running.caught_up(&ledger).await;
    let from_zero = async || {
        pieces(&projection::fold_to::<MetricsState>(&ledger, i64::MAX).await.unwrap().state)
    };
    assert!(running.pieces() == from_zero().await, "a process that ran on");
    // a frozen process saves its old state: a process that starts from it reaches the act and
    // starts again
    assert!(support::snapshots::save::<MetricsState>(&ledger, sequence, &stale).await);
    let restarted = Running::<MetricsState>::start(&ledger);
    restarted.caught_up(&ledger).await;
    assert!(restarted.pieces() == from_zero().await, "a process that began from a stale snapshot");
    restarted.end().await;
    let again = ask(&operations(&ledger), &plain(RebuildStage::Metrics)).await.unwrap();
    assert_eq!((again.differs, again.differences), (false, vec![]));
    assert!(
        matches!(execute(&ledger, &plan, false).await, Err(OperationError::Forbidden(_))),
        "the effect is another now"
    );
    running.end().await;
}

#[tokio::test]
async fn no_shown_series_falls_unless_it_is_allowed() {
    let (_database, ledger, running, (truth, value)) = wrong(|value| value + 5).await;
    let plan = ask(&operations(&ledger), &plain(RebuildStage::Metrics)).await.unwrap();
    assert_eq!((plan.differs, plan.falling, plan.differences.len()), (true, 1, 1));
    assert_eq!(value - truth, 5);
    let before = tables(&ledger.pool).await;
    let refused = execute(&ledger, &plan, false).await.unwrap_err();
    assert!(
        matches!(&refused, OperationError::Forbidden(message) if message.contains("1 shown series would decrease")),
        "{refused:?}"
    );
    assert!(tables(&ledger.pool).await == before);
    execute(&ledger, &plan, true).await.unwrap();
    running.caught_up(&ledger).await;
    let from_zero: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    assert!(running.pieces() == pieces(&from_zero.state));
    running.end().await;
}

#[tokio::test]
async fn a_rebuilt_state_comes_in_one_step_and_no_reader_sees_less_before() {
    let (_database, ledger, running, _) = wrong(|value| value - 1).await;
    let (view, done, reads) =
        (running.view.clone(), CancellationToken::new(), Arc::new(AtomicU32::new(0)));
    let watching = tokio::spawn({
        let (done, reads) = (done.clone(), reads.clone());
        async move {
            let mut last = (0, 0);
            let mut changes = view.watch();
            while done
                .run_until_cancelled(changes.changed())
                .await
                .is_some_and(|changed| changed.is_ok())
            {
                let now = view.with(|state, standing| {
                    let sum = state.deployment(DEPLOYMENT).map_or(0, |one| {
                        one.creations.iter().map(|(_, counter)| counter.value).sum()
                    });
                    assert!(standing.as_of.is_some(), "it is as fresh as before");
                    (standing.sequence.number, sum)
                });
                let now: (i64, u64) = now.expect("there is always a state");
                assert!(now.0 >= last.0 && now.1 >= last.1, "from {last:?} to {now:?}");
                last = now;
                reads.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    for n in 0..5 {
        let act = NewAct {
            actor: "sre-1",
            act: ActKind::Rebuild,
            subject: Subject::Named(MetricsState::NAME),
            reason: "",
            detail: json!({}),
        };
        ledger
            .run(async |conn| {
                snapshots::rebuild(conn, MetricsState::NAME, &act, ledger.clock.now()).await
            })
            .await
            .unwrap();
        let before = reads.load(Ordering::SeqCst);
        builds(&ledger, 300 + n * 10..310 + n * 10).await;
        running.caught_up(&ledger).await;
        eventually(SOON, "the reader has looked", || async {
            reads.load(Ordering::SeqCst) > before
        })
        .await;
    }
    done.cancel();
    watching.await.unwrap();
    running.end().await;
}

#[tokio::test]
async fn the_command_exits_with_1_where_the_shown_state_differs() {
    let site = Site::new().await;
    let licenses = Running::<LicensesState>::start(&site.ledger);
    licenses.caught_up(&site.ledger).await;
    licenses.end().await;
    for stage in ["metrics", "licenses"] {
        let answer = json_of(&site.rehearse(&format!("rebuild plan {stage}"), 0).await);
        assert_eq!((&answer["differs"], answer["hash"].is_string()), (&json!(false), true));
    }
    // 48 at 2025-07-25 become 50: the last byte of the piece of their hour
    let snapshot = "update snapshot_piece set content = set_byte(content, length(content) - 1, 50)
        where stage = 'licenses' and piece like '%/agents/%' and get_byte(content, length(content) - 1) = 48";
    assert_eq!(sqlx::query(snapshot).execute(&site.ledger.pool).await.unwrap().rows_affected(), 1);
    let answer = json_of(&site.rehearse("rebuild plan licenses", 1).await);
    let differences: Vec<_> = answer["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["what"].as_str().unwrap())
        .collect();
    assert_eq!(differences, ["license 1", "license 2", "license 3", "managed agents"], "{answer}");
    let first = &answer["differences"][0];
    assert_eq!((&first["shown"]["count"], &first["rebuilt"]["count"]), (&json!(59), &json!(57)));
    let table =
        run_tallyline(&["rebuild", "plan", "licenses", "--pipeline", &site.file], &[]).await;
    assert!(
        table.status.code() == Some(1) && table.stdout.contains("DIFFERS from the ledger"),
        "{table:?}"
    );
    assert!(
        table.stderr.contains(&format!(
            "folding: {0} of {0} batches",
            site.ledger.run(snapshots::head).await.unwrap().number
        )),
        "{table:?}"
    );
    let hash = answer["hash"].as_str().unwrap();
    assert!(site.run(&format!("rebuild execute licenses --plan {hash}")).await.status.success());
    site.rehearse("rebuild plan licenses", 0).await;
}

#[tokio::test]
async fn an_older_snapshot_is_not_a_difference() {
    let (_database, ledger) = registered_ledger().await;
    builds(&ledger, 0..100).await;
    let folded: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let pieces = pieces(&folded.state);
    assert!(support::snapshots::save::<MetricsState>(&ledger, folded.sequence, &pieces).await);
    builds(&ledger, 100..200).await;
    let plan = ask(&operations(&ledger), &plain(RebuildStage::Metrics)).await.unwrap();
    assert_eq!((plan.differs, plan.sequence.number), (false, folded.sequence.number + 1));
}
