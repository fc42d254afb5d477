//! Lists, retires and reinstates registered sources.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Actor, Desk, OperationError};
use crate::ledger::{ActKind, Retirement, Subject, passes, publications, retirements, sources};

/// Every registered source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sources {
    /// Sources, in the order of their introduction.
    pub sources: Vec<RegisteredSource>,
}

/// A registered source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegisteredSource {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// Histograms contain builds completed at or after this instant.
    pub introduced_at: DateTime<Utc>,
    /// Start of the latest collector pass; absent before the first one.
    pub last_read_at: Option<DateTime<Utc>>,
    /// Completeness: everything that coderd committed before this instant is counted.
    pub complete_until: Option<DateTime<Utc>>,
    /// Usage events queued for publication. For a retired source they are neither sent nor expired.
    pub pending: i64,
    /// Actor, time and reason of the retirement; absent if the source is in use.
    pub retired: Option<Retirement>,
}

/// The source to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OneSource {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
}

impl Desk {
    pub async fn list_sources(&self) -> Result<Sources, OperationError> {
        let retirements = self.ledger.run(retirements::list).await?;
        let mut sources = Vec::new();
        for source in self.ledger.run(sources::list).await? {
            let completeness = self.ledger.run(async |conn| passes::completeness(conn, source.id).await).await?;
            sources.push(RegisteredSource {
                deployment_id: source.deployment_id,
                introduced_at: source.introduced_at,
                last_read_at: self.ledger.run(async |conn| passes::last(conn, source.id).await).await?.started_at,
                complete_until: completeness.complete_until,
                pending: self.ledger.run(async |conn| publications::pending(conn, source.id).await).await?.events,
                retired: retirements.iter().find(|retirement| retirement.deployment_id == source.deployment_id).cloned(),
            });
        }
        Ok(Sources { sources })
    }

    /// Retires a source. Nothing waits for it any more, its audit findings are deleted, and its collector and publisher refuse to work.
    /// Accepted events remain.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] without a reason; [`OperationError::NotFound`]; [`OperationError::Forbidden`] if the source is already
    /// retired.
    pub async fn retire_source(&self, request: &OneSource, actor: &Actor) -> Result<RegisteredSource, OperationError> {
        let id = self.registered(request, actor).await?;
        let act = actor.act(ActKind::Retire, Subject::Named(&id), serde_json::json!({}));
        if !self.ledger.run(async |conn| retirements::retire(conn, request.deployment_id, &act, self.ledger.clock.now()).await).await? {
            let retirement = self.ledger.run(async |conn| retirements::of_deployment(conn, request.deployment_id).await).await?;
            return Err(OperationError::Forbidden(
                retirement.map_or_else(|| format!("source {id} changed meanwhile: retry"), |by| by.to_string()),
            ));
        }
        self.one_source(request).await
    }

    /// Ends the retirement of a source. Its collector and publisher work again.
    ///
    /// # Errors
    /// As [`Desk::retire_source`]; [`OperationError::Forbidden`] if the source is not retired.
    pub async fn reinstate_source(&self, request: &OneSource, actor: &Actor) -> Result<RegisteredSource, OperationError> {
        let id = self.registered(request, actor).await?;
        let act = actor.act(ActKind::Reinstate, Subject::Named(&id), serde_json::json!({}));
        if !self.ledger.run(async |conn| retirements::reinstate(conn, request.deployment_id, &act, self.ledger.clock.now()).await).await? {
            return Err(OperationError::Forbidden(format!("source {id} is not retired; nothing was changed")));
        }
        self.one_source(request).await
    }

    /// The id of a registered source as text. Refuses an act without a reason.
    async fn registered(&self, request: &OneSource, actor: &Actor) -> Result<String, OperationError> {
        actor.require_reason()?;
        self.one_source(request).await?;
        Ok(request.deployment_id.to_string())
    }

    async fn one_source(&self, request: &OneSource) -> Result<RegisteredSource, OperationError> {
        let id = request.deployment_id;
        let found = self.list_sources().await?.sources.into_iter().find(|source| source.deployment_id == id);
        found.ok_or_else(|| OperationError::NotFound(format!("source {id} is not registered: `tallyline sources list` shows the sources")))
    }
}
