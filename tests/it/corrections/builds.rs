//! Corrections of builds and claims. Series fall only at a rebuild that allows it, and the same
//! sequence gives the same state before and after.

use std::time::Duration;

use tallyline::event::{BuildStatus, Event, Payload, Topic, WorkspaceBuildCompleted};
use tallyline::ledger::kept;
use tallyline::operations::{
    CorrectionExecution, CorrectionRequest, OperationError, RebuildExecution, RebuildRequest,
    RebuildStage,
};
use tallyline::projection::{
    Folded, Projection, ProjectionError, ProjectionSettings, View, fold_on, fold_to,
};
use tallyline::stages::{CREATIONS, DeploymentMetrics, LicensesState, MetricsState, Stage};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{agents, agrees, balances, correct, forge, head, operations, operator, plan, request};
use crate::audit::Site;
use crate::support::eventually;
use crate::support::ledger::{act, ask, caught_up_to};

/// The metrics at a sequence, from zero and from snapshots.
async fn metrics(site: &Site, at: i64) -> DeploymentMetrics {
    let folded: Folded<MetricsState> = fold_to(&site.ledger, at).await.unwrap();
    assert_eq!(fold_on::<MetricsState>(&site.ledger, at).await.unwrap(), folded);
    folded.state.deployment(site.coderd.deployment).unwrap().clone()
}

async fn all_metrics(site: &Site, until: i64) -> Vec<Option<DeploymentMetrics>> {
    let mut states = Vec::new();
    for at in 0..=until {
        let folded: Folded<MetricsState> = fold_to(&site.ledger, at).await.unwrap();
        states.push(folded.state.deployment(site.coderd.deployment).cloned());
    }
    states
}

/// The regular creations by template.
fn creations(metrics: &DeploymentMetrics) -> Vec<(String, u64)> {
    (&metrics.creations)
        .into_iter()
        .map(|(labels, counter)| (labels[1].clone(), counter.value))
        .collect()
}

/// A forged build: this one of coderd with changes.
async fn forged(site: &Site, of: Uuid, change: impl FnOnce(&mut WorkspaceBuildCompleted)) -> Event {
    let key = [of.to_string()];
    let rows =
        site.ledger.run(async |conn| kept::events_by_key(conn, Topic::WorkspaceBuilds, &key).await);
    let payload = rows.await.unwrap().remove(0).event.unwrap().payload;
    let Payload::Build(mut build) = payload else { unreachable!("a build") };
    build.template_name = "forged".into();
    change(&mut build);
    Event { deployment: site.coderd.deployment, payload: Payload::Build(build) }
}

fn rebuild() -> RebuildRequest {
    RebuildRequest {
        stage: RebuildStage::Metrics,
        rules: None,
        license: None,
        without: Vec::new(),
        source: None,
        at: None,
    }
}

/// Rebuilds the metrics and returns the number of series that fell.
async fn rebuilt(site: &Site) -> u32 {
    let operations = operations(site);
    let plan = ask(&operations, &rebuild()).await.unwrap();
    assert!(plan.differs);
    let mut execution =
        RebuildExecution { rebuild: rebuild(), hash: plan.hash.unwrap(), allow_decrease: false };
    if plan.falling > 0 {
        let refused = act(&operations, &execution, &operator()).await.unwrap_err();
        assert!(
            matches!(refused, OperationError::Forbidden(message) if message.contains("would decrease"))
        );
        execution.allow_decrease = true;
    }
    act(&operations, &execution, &operator()).await.unwrap();
    assert!(!ask(&operations, &rebuild()).await.unwrap().differs);
    plan.falling
}

#[tokio::test]
async fn a_forged_first_start_gives_way_to_the_true_one_at_a_rebuild() {
    let mut site = Site::new().await;
    let workspace = site.coderd.workspace().await;
    let first = forged(&site, site.creation, |build| {
        (build.build_id, build.workspace_id) = (Uuid::new_v4(), workspace);
    })
    .await;
    let alone = forged(&site, site.creation, |build| {
        (build.build_id, build.workspace_id) = (Uuid::new_v4(), Uuid::new_v4());
    })
    .await;
    forge(&site, &[first.clone(), alone.clone()]).await;
    site.coderd.build(&site.coderd.first_start(workspace).await).await;
    site.collect().await;
    let before = head(&site).await.number;
    let states = all_metrics(&site, before).await;
    let counted = |metrics: &DeploymentMetrics| creations(metrics);
    let old = vec![("docker".to_owned(), 1), ("forged".to_owned(), 2)];
    assert_eq!(counted(&metrics(&site, before).await), old);

    let ids = [first.id(), alone.id()];
    let ids = ids.each_ref().map(String::as_str);
    let planned = plan(&site, &ids).await.unwrap();
    let change = planned.metrics.iter().find(|change| change.family == CREATIONS.name).unwrap();
    assert_eq!((change.removed, change.added), (2, 1), "the true first start is counted instead");
    // a batch in flight, with another workspace's first start
    let mut in_flight = site.ledger.pool.begin().await.unwrap();
    let start = "insert into workspace_first_start (source_id, workspace_id, build_id) select id, gen_random_uuid(), gen_random_uuid() from source";
    sqlx::query(start).execute(&mut *in_flight).await.unwrap();
    correct(&site, &ids).await;
    in_flight.rollback().await.unwrap();
    balances(&site).await;
    assert_eq!(counted(&metrics(&site, i64::MAX).await), old, "metrics do not fall by themselves");
    assert_eq!(all_metrics(&site, before).await, states);

    // a workspace whose only start was forged starts for the first time
    let Payload::Build(alone) = &alone.payload else { unreachable!("a build") };
    let late = forged(&site, site.creation, |build| {
        (build.build_id, build.workspace_id) = (Uuid::new_v4(), alone.workspace_id);
        build.template_name = "late".into();
    })
    .await;
    forge(&site, &[late]).await;
    assert_eq!(counted(&metrics(&site, i64::MAX).await), old, "it was counted once already");
    let before_rebuild = head(&site).await.number;
    let states = all_metrics(&site, before_rebuild).await;

    assert_eq!(rebuilt(&site).await, 1);
    let new = vec![("docker".to_owned(), 2), ("late".to_owned(), 1)];
    assert_eq!(counted(&metrics(&site, i64::MAX).await), new);
    assert_eq!(all_metrics(&site, before_rebuild).await, states, "as known at earlier sequences");
}

#[tokio::test]
async fn a_build_that_differs_only_in_fields_that_coderd_rewrites_needs_the_operators_word() {
    let site = Site::new().await;
    let id = format!("workspace_build_completed:{}", site.creation);
    let rename = "update templates set name = 'renamed' where id = (
             select w.template_id from workspaces w join workspace_builds b on b.workspace_id = w.id where b.id = $1)";
    site.tamper_source(rename, site.creation).await;
    let refused = plan(&site, &[&id]).await;
    assert!(
        matches!(&refused, Err(OperationError::Forbidden(message)) if message.contains("only in template_name")),
        "{refused:?}"
    );
    let correction = CorrectionRequest { allow_confirmed: true, ..request(&[&id]) };
    let plan = ask(&operations(&site), &correction).await.unwrap();
    assert_eq!(plan.events[0].differs, ["template_name"]);
    let execution = CorrectionExecution { correction, hash: plan.hash };
    act(&operations(&site), &execution, &operator()).await.unwrap();
    balances(&site).await;
    rebuilt(&site).await;
    assert_eq!(creations(&metrics(&site, i64::MAX).await), [("renamed".to_owned(), 1)]);
}

/// A fold in a process, from a snapshot if there is one.
struct Running<S> {
    view: View<S>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ProjectionError>>,
}

impl<S: Stage + Clone + PartialEq + std::fmt::Debug> Running<S> {
    fn start(site: &Site) -> Self {
        let settings =
            ProjectionSettings { poll: Duration::from_millis(20), ..ProjectionSettings::default() };
        let projection = Projection::<S>::new(site.ledger.clone(), settings);
        let (view, stop) = (projection.view(), CancellationToken::new());
        let signal = stop.clone();
        Running { view, stop, task: tokio::spawn(async move { projection.run(&signal).await }) }
    }

    /// It reaches the ledger's end, with the state that a fold from zero has there.
    async fn equals_a_fold_from_zero(&self, site: &Site) {
        let end = head(site).await.number;
        let reached = || async { caught_up_to(&self.view) >= end };
        eventually(Duration::from_secs(60), "the fold reaches the end", reached).await;
        let folded: Folded<S> = fold_to(&site.ledger, end).await.unwrap();
        assert_eq!(self.view.with(|state, _| state.clone()), Some(folded.state));
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_fold_has_the_state_of_a_fold_from_zero() {
    let site = Site::new().await;
    let folds = (Running::<MetricsState>::start(&site), Running::<LicensesState>::start(&site));
    let later = Running::<MetricsState>::start(&site);
    let build = forged(&site, site.creation, |build| {
        (build.build_id, build.workspace_id) = (Uuid::new_v4(), Uuid::new_v4());
    })
    .await;
    let usage = agents(&site, "forged", 9, site.coderd.now().await);
    forge(&site, &[build.clone(), usage]).await;
    later.equals_a_fold_from_zero(&site).await;
    later.end().await; // it saves a snapshot
    correct(&site, &[&build.id(), "forged"]).await;
    folds.0.equals_a_fold_from_zero(&site).await;
    folds.1.equals_a_fold_from_zero(&site).await;
    rebuilt(&site).await;
    let later = Running::<MetricsState>::start(&site);
    later.equals_a_fold_from_zero(&site).await;
    folds.0.equals_a_fold_from_zero(&site).await;
    folds.1.equals_a_fold_from_zero(&site).await;
    assert_eq!(creations(&metrics(&site, i64::MAX).await), [("docker".to_owned(), 1)]);
    later.end().await;
    folds.0.end().await;
    folds.1.end().await;
}

#[tokio::test]
async fn a_build_and_a_claim_get_coderds_content() {
    let site = Site::new().await;
    let workspace = site.coderd.workspace().await;
    let build = site.coderd.first_start(workspace).await;
    // in coderd, but collected only as what the forger made of it
    let id = site.coderd.build(&build).await;
    let failed = forged(&site, site.creation, |forged| {
        (forged.build_id, forged.workspace_id) = (id, workspace);
        (forged.status, forged.first_successful_start) = (BuildStatus::Failed, false);
    })
    .await;
    let mut claim = site.claims().await.remove(0);
    (claim.build_id, claim.template_name) = (Uuid::new_v4(), "forged".into());
    let claim =
        Event { deployment: site.coderd.deployment, payload: Payload::Claim(Box::new(claim)) };
    forge(&site, &[failed.clone(), claim.clone()]).await;
    site.tamper("update source set introduced_at = '2020-01-01T00:00:00Z'").await;

    let ids = [failed.id(), claim.id()];
    let corrected = correct(&site, &ids.each_ref().map(String::as_str)).await;
    let plan = corrected.plan.unwrap();
    let [build, claim] = &plan.events[..] else { panic!("two events") };
    let (build, claim) = if build.after.is_some() { (build, claim) } else { (claim, build) };
    assert_eq!(build.after.as_ref().unwrap()["data"]["status"], "succeeded");
    assert_eq!(claim.after, None);
    agrees(&site).await;
    assert_eq!(creations(&metrics(&site, i64::MAX).await), [("docker".to_owned(), 1)]);
    rebuilt(&site).await;
    let metrics = metrics(&site, i64::MAX).await;
    assert_eq!(creations(&metrics), [("docker".to_owned(), 2)]);
    assert!((&metrics.claim_seconds).into_iter().all(|(labels, _)| labels[1] != "forged"));
    agrees(&site).await;
}
