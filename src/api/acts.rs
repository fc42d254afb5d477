//! `GET /api/v1/acts`: the audit trail.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::Serving;
use super::answer::Problem;
use super::asked::Query;
use crate::operations::{Acts, ListActs};

pub(super) async fn list(State(serving): State<Arc<Serving>>, Query(request): Query<ListActs>) -> Result<Json<Acts>, Problem> {
    Ok(Json(serving.api.desk.acts(&request).await?))
}
