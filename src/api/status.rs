//! `GET /api/v1/status`: where everything stands, counted in the ledger when asked.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;

use super::Serving;
use super::answer::Problem;
use crate::status::{self, Folded, Status};

/// How long the log may take to tell its ends.
const LOG_ANSWER: Duration = Duration::from_secs(5);

/// One request at a time is counted.
pub(super) async fn status(State(serving): State<Arc<Serving>>) -> Result<Json<Status>, Problem> {
    let _turn = serving.counting.lock().await;
    let api = &serving.api;
    let status = api.own.ledger.in_time(status::read(&api.own.ledger, &api.own.log, LOG_ANSWER)).await;
    let mut status = status.map_err(|error| Problem::unavailable(format!("the ledger cannot be read: {}", crate::cause::text(&error))))?;
    status.folded_sequences = Some(Folded {
        metrics: api.metrics.watch().borrow().map(|standing| standing.sequence),
        licenses: api.licenses.watch().borrow().map(|standing| standing.sequence),
    });
    Ok(Json(status))
}
