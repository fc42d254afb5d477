//! `GET /api/v1/status`: the state of all parts, counted in the ledger for each request.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;

use super::Serving;
use super::answer::Problem;
use crate::status::{self, Folded, Status};

/// Timeout to query the ends of the log.
const LOG_ANSWER: Duration = Duration::from_secs(5);

/// Counts for one request at a time.
pub(super) async fn status(State(serving): State<Arc<Serving>>) -> Result<Json<Status>, Problem> {
    let _turn = serving.counting.lock().await;
    let api = &serving.api;
    let status = status::read(&api.own.ledger, &api.own.log, LOG_ANSWER).await;
    let mut status = status.map_err(|error| Problem::unavailable(format!("the ledger cannot be read: {}", crate::cause::text(&error))))?;
    status.folded_sequences = Some(Folded {
        metrics: api.metrics.watch().borrow().map(|standing| standing.sequence),
        licenses: api.licenses.watch().borrow().map(|standing| standing.sequence),
    });
    Ok(Json(status))
}
