//! `GET /api/v1/managed-agents/count`: how many managed agents were started in a window, from memory.

use crate::ledger::Sequence;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::asked::Query;
use super::entitlements::from_memory;

/// The window that is counted: half-open, to the microsecond.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Window {
    /// Included.
    start: DateTime<Utc>,
    /// Not included.
    end: DateTime<Utc>,
    /// The deployment; needed where there are several and none is configured.
    source: Option<Uuid>,
    /// Counts in days instead.
    days: Option<Days>,
}

/// How days are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Days {
    /// As coderd counts: whole UTC days, those of both ends inside.
    Whole,
}

/// A count and up to where it is true.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Count {
    /// Managed agents that were started in the window.
    count: u128,
    /// Included.
    start: DateTime<Utc>,
    /// Not included.
    end: DateTime<Utc>,
    /// Whatever was committed to the ledger before is counted.
    as_of: DateTime<Utc>,
    /// The same as a ledger sequence.
    sequence: Sequence,
    /// All that coderd committed before is counted; null where nothing can be said.
    complete_until: Option<DateTime<Utc>>,
    /// The deployment.
    source: Uuid,
}

pub(super) async fn count(State(serving): State<Arc<Serving>>, Query(window): Query<Window>) -> Result<Json<Count>, Problem> {
    let Window { start, end, source, days } = window;
    if start > end {
        return Err(Problem::field("end", "lies before start"));
    }
    let answer = from_memory(&serving, source, |licenses| {
        let agents = &licenses.agents;
        match days {
            Some(Days::Whole) => agents.count_whole_days(start, end),
            None => agents.count(start, end),
        }
    })?;
    let complete_until = serving.known.completeness(answer.source, answer.standing).complete_until;
    let (sequence, as_of, source) = (answer.standing.sequence, answer.as_of, answer.source);
    Ok(Json(Count { count: answer.value, start, end, as_of, sequence, complete_until, source }))
}
