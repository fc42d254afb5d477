//! Paths for operators. Each path is one operation.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Serving;
use super::answer::Problem;
use super::asked::{Change, Query};
use crate::audit::AuditReport;
use crate::ledger::{ListActs, Pause, PublishStop};
use crate::operations::recover::{RecoverExecution, RecoverPlan, RecoverRequest};
use crate::operations::{
    Acts, Admitted, AuditFindings, CoderdCutOff, CountRejects, DiscardRejects, DiscardedRejects, ListRejects, LogRange, OneSource,
    PauseRequest, Pauses, Proof, ProveRequest, RebuildExecution, RebuildPlan, RebuildRequest, Rebuilt, RegisteredSource, RejectCounts,
    RejectPage, ReplayPlan, Resubmit, Resubmitted, RunAudit, ShownReject, Sources,
};

type Serves = State<Arc<Serving>>;
type Answer<T> = Result<Json<T>, Problem>;

#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct OneReject {
    /// Number of the reject.
    id: i64,
}

/// A request without further fields.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct Nothing {}

pub(super) async fn acts(State(serving): Serves, Query(request): Query<ListActs>) -> Answer<Acts> {
    Ok(Json(serving.api.desk.acts(&request).await?))
}

pub(super) async fn pauses(State(serving): Serves) -> Answer<Pauses> {
    Ok(Json(serving.api.desk.pauses().await?))
}

pub(super) async fn pause(State(serving): Serves, change: Change<PauseRequest>) -> Answer<Pause> {
    Ok(Json(serving.api.desk.pause(&change.asked, &change.actor).await?))
}

pub(super) async fn resume(State(serving): Serves, change: Change<PauseRequest>) -> Answer<Pause> {
    Ok(Json(serving.api.desk.resume(&change.asked, &change.actor).await?))
}

pub(super) async fn coderd_cut_off(State(serving): Serves, change: Change<CoderdCutOff>) -> Answer<PublishStop> {
    Ok(Json(serving.api.desk.coderd_cut_off(&change.asked, &change.actor).await?))
}

pub(super) async fn list_rejects(State(serving): Serves, Query(request): Query<ListRejects>) -> Answer<RejectPage> {
    Ok(Json(serving.api.desk.list_rejects(&request).await?))
}

pub(super) async fn count_rejects(State(serving): Serves, Query(request): Query<CountRejects>) -> Answer<RejectCounts> {
    Ok(Json(serving.api.desk.count_rejects(&request).await?))
}

pub(super) async fn show_reject(State(serving): Serves, asked: Query<OneReject>) -> Answer<ShownReject> {
    Ok(Json(serving.api.desk.show_reject(asked.id).await?))
}

pub(super) async fn resubmit_rejects(State(serving): Serves, change: Change<Resubmit>) -> Answer<Resubmitted> {
    Ok(Json(serving.api.desk.resubmit_rejects(&change.asked, &change.actor).await?))
}

pub(super) async fn discard_rejects(State(serving): Serves, change: Change<DiscardRejects>) -> Answer<DiscardedRejects> {
    Ok(Json(serving.api.desk.discard_rejects(&change.asked, &change.actor).await?))
}

pub(super) async fn admit_rejects(State(serving): Serves, change: Change<Nothing>) -> Answer<Admitted> {
    Ok(Json(serving.api.desk.admit_rejects(&change.actor, |_| {}, &serving.stop).await?))
}

pub(super) async fn audit_findings(State(serving): Serves) -> Answer<AuditFindings> {
    Ok(Json(serving.api.desk.audit_findings().await?))
}

pub(super) async fn audit(State(serving): Serves, change: Change<RunAudit>) -> Answer<AuditReport> {
    Ok(Json(serving.api.desk.audit(&change.asked, |_, _| ()).await?))
}

pub(super) async fn list_sources(State(serving): Serves) -> Answer<Sources> {
    Ok(Json(serving.api.desk.list_sources().await?))
}

pub(super) async fn retire_source(State(serving): Serves, change: Change<OneSource>) -> Answer<RegisteredSource> {
    Ok(Json(serving.api.desk.retire_source(&change.asked, &change.actor).await?))
}

pub(super) async fn reinstate_source(State(serving): Serves, change: Change<OneSource>) -> Answer<RegisteredSource> {
    Ok(Json(serving.api.desk.reinstate_source(&change.asked, &change.actor).await?))
}

pub(super) async fn prove(State(serving): Serves, Query(request): Query<ProveRequest>) -> Answer<Proof> {
    Ok(Json(serving.api.desk.prove(&request).await?))
}

pub(super) async fn plan_replay(State(serving): Serves, change: Change<LogRange>) -> Answer<ReplayPlan> {
    Ok(Json(serving.api.desk.plan_replay(&change.asked, |_| {}, &serving.stop).await?))
}

pub(super) async fn plan_rebuild(State(serving): Serves, change: Change<RebuildRequest>) -> Answer<RebuildPlan> {
    Ok(Json(serving.api.desk.plan_rebuild(&change.asked, |_, _| {}).await?))
}

pub(super) async fn execute_rebuild(State(serving): Serves, change: Change<RebuildExecution>) -> Answer<Rebuilt> {
    Ok(Json(serving.api.desk.execute_rebuild(&change.asked, &change.actor, |_, _| {}).await?))
}

pub(super) async fn plan_recovery(State(serving): Serves, change: Change<RecoverRequest>) -> Answer<RecoverPlan> {
    Ok(Json(serving.api.desk.plan_recovery(&change.asked, &|_, _| {}, &serving.stop).await?))
}

pub(super) async fn execute_recovery(State(serving): Serves, change: Change<RecoverExecution>) -> Answer<RecoverPlan> {
    Ok(Json(serving.api.desk.execute_recovery(&change.asked, &change.actor, &|_, _| {}, &serving.stop).await?))
}
