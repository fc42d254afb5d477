//! Lists, retires and reinstates registered sources.

use axum::http::Method;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ApiRequest, Operation, OperationError, Operations, Run};
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

/// List the registered sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ListSources {}

/// Retire a source: nothing waits for it, and its collector and publisher refuse to work.
///
/// Accepted events remain. The source's audit findings are deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct RetireSource {
    /// coderd's deployment id.
    #[arg(value_name = "DEPLOYMENT_ID")]
    pub deployment_id: Uuid,
}

/// End the retirement of a source: its collector and publisher work again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ReinstateSource {
    /// coderd's deployment id.
    #[arg(value_name = "DEPLOYMENT_ID")]
    pub deployment_id: Uuid,
}

impl ApiRequest for ListSources {
    type Answer = Sources;
    const PATH: &'static str = "/api/v1/sources";
    const ANSWER: &'static str = "All sources, in the order of their introduction.";
}

impl Operation for ListSources {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<Sources, OperationError> {
        operations.sources().await
    }
}

impl ApiRequest for RetireSource {
    type Answer = RegisteredSource;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/sources/retire";
    const ANSWER: &'static str =
        "The retired source. 404: it is not registered. 409: it is already retired.";
    const NEEDS_REASON: bool = true;
}

impl Operation for RetireSource {
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<RegisteredSource, OperationError> {
        let id = self.deployment_id;
        operations.source(id).await?;
        let subject = id.to_string();
        let act = actor.act(ActKind::Retire, Subject::Named(&subject), serde_json::json!({}));
        let now = operations.ledger.clock.now();
        if !operations
            .ledger
            .run(async |conn| retirements::retire(conn, id, &act, now).await)
            .await?
        {
            let retirement = operations
                .ledger
                .run(async |conn| retirements::of_deployment(conn, id).await)
                .await?;
            let message = retirement.map_or_else(
                || format!("source {id} changed meanwhile: retry"),
                |by| by.to_string(),
            );
            return Err(OperationError::Forbidden(message));
        }
        operations.source(id).await
    }
}

impl ApiRequest for ReinstateSource {
    type Answer = RegisteredSource;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/sources/reinstate";
    const ANSWER: &'static str = "The source. 404: it is not registered. 409: it is not retired.";
    const NEEDS_REASON: bool = true;
}

impl Operation for ReinstateSource {
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<RegisteredSource, OperationError> {
        let id = self.deployment_id;
        operations.source(id).await?;
        let subject = id.to_string();
        let act = actor.act(ActKind::Reinstate, Subject::Named(&subject), serde_json::json!({}));
        let now = operations.ledger.clock.now();
        if !operations
            .ledger
            .run(async |conn| retirements::reinstate(conn, id, &act, now).await)
            .await?
        {
            return Err(OperationError::Forbidden(format!(
                "source {id} is not retired; nothing was changed"
            )));
        }
        operations.source(id).await
    }
}

impl Operations {
    async fn sources(&self) -> Result<Sources, OperationError> {
        let retirements = self.ledger.run(retirements::list).await?;
        let mut sources = Vec::new();
        for source in self.ledger.run(sources::list).await? {
            let completeness =
                self.ledger.run(async |conn| passes::completeness(conn, source.id).await).await?;
            sources.push(RegisteredSource {
                deployment_id: source.deployment_id,
                introduced_at: source.introduced_at,
                last_read_at: self
                    .ledger
                    .run(async |conn| passes::last(conn, source.id).await)
                    .await?
                    .started_at,
                complete_until: completeness.complete_until,
                pending: self
                    .ledger
                    .run(async |conn| publications::pending(conn, source.id).await)
                    .await?
                    .events,
                retired: retirements
                    .iter()
                    .find(|retirement| retirement.deployment_id == source.deployment_id)
                    .cloned(),
            });
        }
        Ok(Sources { sources })
    }

    async fn source(&self, id: Uuid) -> Result<RegisteredSource, OperationError> {
        let found =
            self.sources().await?.sources.into_iter().find(|source| source.deployment_id == id);
        found.ok_or_else(|| {
            OperationError::NotFound(format!(
                "source {id} is not registered: `tallyline sources list` shows the sources"
            ))
        })
    }
}
