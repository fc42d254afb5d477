//! `/api/v1/pauses`: what stands still, and until when it does.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::Serving;
use super::answer::Problem;
use super::asked::Change;
use crate::ledger::Pause;
use crate::operations::{PauseRequest, Pauses};

pub(super) async fn list(State(serving): State<Arc<Serving>>) -> Result<Json<Pauses>, Problem> {
    Ok(Json(serving.api.desk.pauses().await?))
}

pub(super) async fn pause(State(serving): State<Arc<Serving>>, change: Change<PauseRequest>) -> Result<Json<Pause>, Problem> {
    Ok(Json(serving.api.desk.pause(&change.asked, &change.actor).await?))
}

pub(super) async fn resume(State(serving): State<Arc<Serving>>, change: Change<PauseRequest>) -> Result<Json<Pause>, Problem> {
    Ok(Json(serving.api.desk.resume(&change.asked, &change.actor).await?))
}
