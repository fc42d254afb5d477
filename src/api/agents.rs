//! `GET /api/v1/managed-agents/count`: how many managed agents were started in a window, from memory.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::entitlements::from_memory;
use super::parameters::Parameters;

/// A count and up to where it is true.
#[derive(Debug, Serialize)]
pub(super) struct Count {
    count: u128,
    start: DateTime<Utc>,
    end: DateTime<Utc>,
    /// Whatever was committed to the ledger before is counted.
    as_of: DateTime<Utc>,
    sequence: i64,
    /// All that coderd committed before is counted; null where nothing can be said.
    complete_until: Option<DateTime<Utc>>,
    source: Uuid,
}

/// The window is half-open, `start` included and `end` not, to the microsecond. `days=whole` counts as coderd does: whole UTC days,
/// those of both ends inside.
pub(super) async fn count(State(serving): State<Arc<Serving>>, uri: Uri) -> Result<Json<Count>, Problem> {
    let parameters = Parameters::of(&uri, &["start", "end", "source", "days"])?;
    let (start, end) = (parameters.time("start")?, parameters.time("end")?);
    if start > end {
        return Err(Problem::parameter("end", "lies before start"));
    }
    let whole_days = parameters.is("days", "whole")?;
    let answer = from_memory(&serving, parameters.source()?, |licenses| {
        let agents = licenses.agents();
        if whole_days { agents.count_whole_days(start, end) } else { agents.count(start, end) }
    })?;
    let complete_until = serving.known.completeness(answer.source, answer.standing).complete_until;
    let (sequence, as_of, source) = (answer.standing.sequence, answer.as_of, answer.source);
    Ok(Json(Count { count: answer.value, start, end, as_of, sequence, complete_until, source }))
}
