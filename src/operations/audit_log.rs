//! Lists the audit log.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ApiRequest, Operation, OperationError, Run, instant, optional_instant};
use crate::ledger::{Act, ActFilter, ActKind, acts};

/// Acts of one page: the default and the maximum.
const PAGE: u16 = 100;
const MAX_ACTS: u16 = 1000;

/// Show the audit log: actor, act, time and reason, the latest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ListActs {
    /// Only acts of this actor: a person's login, a token's name, or `tallyline VERSION`.
    #[arg(long, value_name = "NAME")]
    pub actor: Option<String>,
    /// Only acts of this kind.
    #[arg(long)]
    pub act: Option<ActKind>,
    /// Only acts on this subject: a reject's id, a plan's hash, an operation, a stage or a
    /// deployment.
    #[arg(long)]
    pub subject: Option<String>,
    /// Only acts at or after this instant.
    #[arg(long, value_name = "TIME", value_parser = instant)]
    #[serde(default, deserialize_with = "optional_instant")]
    pub from: Option<DateTime<Utc>>,
    /// Only acts before this instant.
    #[arg(long, value_name = "TIME", value_parser = instant)]
    #[serde(default, deserialize_with = "optional_instant")]
    pub to: Option<DateTime<Utc>>,
    /// Only acts with smaller ids: the next page.
    #[arg(long, value_name = "ID")]
    pub before: Option<i64>,
    /// Maximum number of acts, 1 to 1000. Default: 100.
    #[arg(long, value_name = "COUNT")]
    pub limit: Option<u16>,
}

/// A page of the audit log, the latest act first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Acts {
    /// Acts of this page.
    pub acts: Vec<Act>,
    /// `before` of the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_before: Option<i64>,
}

impl ApiRequest for ListActs {
    type Answer = Acts;
    const PATH: &'static str = "/api/v1/audit-log";
    const OLD_PATH: Option<&'static str> = Some("/api/v1/acts");
    const ANSWER: &'static str = "One page.";
}

impl Operation for ListActs {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<Acts, OperationError> {
        let limit = self.limit.unwrap_or(PAGE);
        if !(1..=MAX_ACTS).contains(&limit) {
            return Err(OperationError::Invalid {
                field: "limit",
                message: format!("must be 1 to {MAX_ACTS}"),
            });
        }
        let Self { actor, act, subject, from, to, before, .. } = self.clone();
        let filter = ActFilter { actor, act, subject, from, to, before };
        // one act more than the limit shows whether another page exists
        let mut acts = operations
            .ledger
            .run(async |conn| acts::list(conn, &filter, i64::from(limit) + 1).await)
            .await?;
        let more = acts.len() > usize::from(limit);
        acts.truncate(usize::from(limit));
        let next_before = acts.last().filter(|_| more).map(|act| act.id);
        Ok(Acts { acts, next_before })
    }
}
