//! `GET /api/v2/entitlements`: coderd's own shape, from memory.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, SecondsFormat, Utc};
use serde::Deserialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::asked::Query;
use super::standing::choose;
use crate::projection::Standing;
use crate::stages::DeploymentLicenses;

/// Which deployment is shown.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Shown {
    /// Needed where there are several and none is configured.
    pub(super) source: Option<Uuid>,
}

/// How fresh an answer is, so that the body stays coderd's.
pub(super) const HEADERS: &[(&str, &str)] = &[
    ("Tallyline-As-Of", "An instant: whatever was committed to the ledger before is counted."),
    ("Tallyline-Sequence", "The same as a ledger sequence."),
    ("Tallyline-Complete-Until", "An instant: all that coderd committed before is counted. Left out where nothing can be said."),
];

/// What a deployment is entitled to now, with [`HEADERS`].
pub(super) async fn entitlements(State(serving): State<Arc<Serving>>, asked: Query<Shown>) -> Result<Response, Problem> {
    let now = serving.api.clock.now();
    let rules = serving.known.rules().ok_or_else(|| {
        Problem::unavailable("which license rules hold is not known: the ledger was not asked yet, or names rules of a later version")
    })?;
    let answer = from_memory(&serving, asked.source, |licenses| licenses.entitlements(rules, now))?;
    let mut response = Json(answer.value).into_response();
    let complete_until = serving.known.completeness(answer.source, answer.standing).complete_until;
    let instants = [("tallyline-as-of", Some(answer.as_of)), ("tallyline-complete-until", complete_until)];
    for (name, instant) in instants {
        let value = instant.and_then(|instant| instant.to_rfc3339_opts(SecondsFormat::AutoSi, true).try_into().ok());
        if let Some(value) = value {
            response.headers_mut().insert(name, value);
        }
    }
    if let Ok(sequence) = answer.standing.sequence.to_string().try_into() {
        response.headers_mut().insert("tallyline-sequence", sequence);
    }
    Ok(response)
}

/// An answer of one moment.
pub(super) struct Answer<T> {
    pub(super) value: T,
    pub(super) source: Uuid,
    pub(super) standing: Standing,
    pub(super) as_of: DateTime<Utc>,
}

/// What `read` makes of the licenses of the source that is meant.
pub(super) fn from_memory<T>(
    serving: &Serving,
    asked: Option<Uuid>,
    read: impl FnOnce(&DeploymentLicenses) -> T,
) -> Result<Answer<T>, Problem> {
    let behind = || Problem::unavailable("the ledger's events are still being read: no answer yet");
    let answer = serving.api.licenses.with(|state, standing| {
        // A state that has not reached the ledger's end knows too few licenses and too little usage.
        let as_of = standing.as_of.ok_or_else(behind)?;
        let there: Vec<Uuid> = state.deployments().map(|(id, _)| id).collect();
        let meant = serving.settings.source.or_else(|| serving.known.now()?.only_one_in_use());
        let source = choose(&there, meant, asked)?;
        let licenses = state.deployment(source).ok_or_else(behind)?;
        Ok(Answer { value: read(licenses), source, standing, as_of })
    });
    answer.unwrap_or_else(|| Err(behind()))
}
