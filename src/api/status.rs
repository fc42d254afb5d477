//! `GET /api/v1/status`: the state of all parts, counted in the ledger for each request.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Serving;
use super::answer::Problem;
use super::received::Received;
use crate::operations::ApiRequest;
use crate::status::{self, Folded, Status};

/// Timeout to query the ends of the log.
const LOG_ANSWER: Duration = Duration::from_secs(5);

/// Show the state of all parts.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShowStatus {}

impl ApiRequest for ShowStatus {
    type Answer = Status;
    const PATH: &'static str = "/api/v1/status";
    const ANSWER: &'static str = "Counted in the ledger for this request.";
}

/// Counts for one request at a time.
pub(super) async fn status(
    State(serving): State<Arc<Serving>>,
    _: Received<ShowStatus>,
) -> Result<Json<Status>, Problem> {
    let _turn = serving.counting.lock().await;
    let api = &serving.api;
    let status = status::read(&api.own.ledger, &api.own.log, LOG_ANSWER).await;
    let mut status = status.map_err(|error| {
        Problem::unavailable(format!("the ledger cannot be read: {}", crate::cause::text(&error)))
    })?;
    status.folded_sequences = Some(Folded {
        metrics: api.metrics.watch().borrow().map(|freshness| freshness.sequence),
        licenses: api.licenses.watch().borrow().map(|freshness| freshness.sequence),
    });
    Ok(Json(status))
}
