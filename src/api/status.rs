//! `GET /api/v1/status`: where everything stands, counted in the ledger when asked.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::Serving;
use super::answer::Problem;
use crate::status::{self, Status};

/// How long the log may take to tell its ends.
const LOG_ANSWER: Duration = Duration::from_secs(5);

/// The fields of `tallyline status --output json`, and how far this process has folded.
#[derive(Serialize)]
pub(super) struct Answer {
    at: DateTime<Utc>,
    folded_sequences: Folded,
    #[serde(flatten)]
    status: Status,
}

/// Absent where the fold has not begun.
#[derive(Serialize)]
struct Folded {
    metrics: Option<i64>,
    licenses: Option<i64>,
}

/// One request at a time is counted.
pub(super) async fn status(State(serving): State<Arc<Serving>>) -> Result<Json<Answer>, Problem> {
    let _turn = serving.counting.lock().await;
    let api = &serving.api;
    let status = status::read(&api.ledger, &api.log, LOG_ANSWER).await;
    let status = status.map_err(|error| Problem::unavailable(format!("the ledger cannot be read: {error}")))?;
    let folded_sequences = Folded {
        metrics: api.metrics.watch().borrow().map(|standing| standing.sequence),
        licenses: api.licenses.watch().borrow().map(|standing| standing.sequence),
    };
    Ok(Json(Answer { at: api.clock.now(), folded_sequences, status }))
}
