//! `GET /api/v2/entitlements`: entitlements in coderd's format, from memory.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::chosen_source::choose;
use super::received::Received;
use crate::license::Entitlements;
use crate::projection::Freshness;
use crate::stages::DeploymentLicenses;

/// The deployment to show.
#[derive(Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Shown {
    /// Id of the deployment. Required if there are several deployments and none is configured.
    pub(super) source: Option<Uuid>,
}

/// Show the current entitlements of a deployment in coderd's format
///
/// The headers contain the freshness of the answer, because the body has coderd's format.
#[utoipa::path(
    get,
    path = "/api/v2/entitlements",
    params(Shown),
    responses((
        status = 200,
        description = "From memory.",
        body = Entitlements,
        headers(
            ("Tallyline-As-Of" = String, description = "Everything committed to the ledger before this instant is counted."),
            ("Tallyline-Sequence" = String, description = "The ledger sequence of the answer."),
            (
                "Tallyline-Complete-Until" = String,
                description = "Everything that coderd committed before this instant is counted. Absent if not known."
            ),
        )
    ))
)]
pub(super) async fn entitlements(
    State(serving): State<Arc<Serving>>,
    asked: Received<Shown>,
) -> Result<Response, Problem> {
    let now = serving.api.clock.now();
    let rules = serving.known.rules().ok_or_else(|| {
        Problem::unavailable("the license rules in force are not known: the ledger was not read yet, or names rules of a later version")
    })?;
    let answer =
        from_memory(&serving, asked.request.source, |licenses| licenses.entitlements(rules, now))?;
    let mut response = Json(answer.value).into_response();
    let complete_until = serving.known.completeness(answer.source, answer.freshness).complete_until;
    let instants =
        [("tallyline-as-of", Some(answer.as_of)), ("tallyline-complete-until", complete_until)];
    for (name, instant) in instants {
        let value = instant.and_then(|instant| {
            instant.to_rfc3339_opts(SecondsFormat::AutoSi, true).try_into().ok()
        });
        if let Some(value) = value {
            response.headers_mut().insert(name, value);
        }
    }
    if let Ok(sequence) = answer.freshness.sequence.to_string().try_into() {
        response.headers_mut().insert("tallyline-sequence", sequence);
    }
    Ok(response)
}

/// An answer from one moment.
pub(super) struct Answer<T> {
    pub(super) value: T,
    pub(super) source: Uuid,
    pub(super) freshness: Freshness,
    pub(super) as_of: DateTime<Utc>,
}

/// Applies `read` to the licenses of the requested source.
pub(super) fn from_memory<T>(
    serving: &Serving,
    asked: Option<Uuid>,
    read: impl FnOnce(&DeploymentLicenses) -> T,
) -> Result<Answer<T>, Problem> {
    let behind = || Problem::unavailable("the ledger's events are still being read: no answer yet");
    let answer = serving.api.licenses.with(|state, freshness| {
        // a state that has not reached the end of the ledger may lack licenses and usage
        let as_of = freshness.as_of.ok_or_else(behind)?;
        let there: Vec<Uuid> = state.deployments().map(|(id, _)| id).collect();
        let meant = serving.settings.source.or_else(|| serving.known.now()?.only_one_in_use());
        let source = choose(&there, meant, asked)?;
        let licenses = state.deployment(source).ok_or_else(behind)?;
        Ok(Answer { value: read(licenses), source, freshness, as_of })
    });
    answer.unwrap_or_else(|| Err(behind()))
}
