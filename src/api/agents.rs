//! `GET /api/v1/managed-agents/count`: number of managed agents started in a window, from memory.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::entitlements::from_memory;
use super::received::Received;
use crate::ledger::Sequence;
use crate::operations::exact_instant;

/// The window to count: half-open, to the microsecond.
#[derive(Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Window {
    /// Start of the window, included.
    #[serde(deserialize_with = "exact_instant")]
    start: DateTime<Utc>,
    /// End of the window, not included.
    #[serde(deserialize_with = "exact_instant")]
    end: DateTime<Utc>,
    /// Id of the deployment. Required if there are several deployments and none is configured.
    source: Option<Uuid>,
    /// Count whole days instead of exact instants.
    #[param(inline)]
    days: Option<Days>,
}

/// How to count days.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Days {
    /// Like coderd: whole UTC days, including the days of both ends.
    Whole,
}

/// A count, and the instant until which it is complete.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Count {
    /// Managed agents started in the window.
    count: u128,
    /// Start of the window, included.
    start: DateTime<Utc>,
    /// End of the window, not included.
    end: DateTime<Utc>,
    /// Everything committed to the ledger before this instant is counted.
    as_of: DateTime<Utc>,
    /// The ledger sequence for `as_of`.
    sequence: Sequence,
    /// Completeness: everything that coderd committed before this instant is counted. Null if not
    /// known.
    complete_until: Option<DateTime<Utc>>,
    /// Id of the deployment.
    source: Uuid,
}

/// Count the managed agents that were started in a window
#[utoipa::path(
    get,
    path = "/api/v1/managed-agents/count",
    params(Window),
    responses((status = 200, description = "From memory, with its completeness.", body = Count))
)]
pub(super) async fn count(
    State(serving): State<Arc<Serving>>,
    asked: Received<Window>,
) -> Result<Json<Count>, Problem> {
    let Window { start, end, source, days } = asked.request;
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
    let complete_until = serving.known.completeness(answer.source, answer.freshness).complete_until;
    let (sequence, as_of, source) = (answer.freshness.sequence, answer.as_of, answer.source);
    Ok(Json(Count { count: answer.value, start, end, as_of, sequence, complete_until, source }))
}
