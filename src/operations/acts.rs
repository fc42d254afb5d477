//! The audit trail, read.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Desk, OperationError};
use crate::ledger::{Act, ActFilter, ActKind};

/// Acts of one page where nothing else is asked for, and the most there can be.
const PAGE: u16 = 100;
const MOST: u16 = 1000;

/// Which acts are shown: those that fit all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListActs {
    /// Only this actor's: a person's login, a token's name, or `tallyline VERSION`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// Only these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub act: Option<ActKind>,
    /// Only what was done to this: a reject's id, a plan's hash, an operation, a deployment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Only at or after this instant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<DateTime<Utc>>,
    /// Only before this instant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<DateTime<Utc>>,
    /// Only with smaller ids: `next_before` of the page before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
    /// Most acts of the page, 1 to 1000; 100 where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u16>,
}

/// A page of the audit trail, the latest act first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Acts {
    /// The acts.
    pub acts: Vec<Act>,
    /// `before` of the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_before: Option<i64>,
}

impl Desk {
    /// One page of the audit trail.
    pub async fn acts(&self, request: &ListActs) -> Result<Acts, OperationError> {
        let limit = request.limit.unwrap_or(PAGE);
        if !(1..=MOST).contains(&limit) {
            return Err(OperationError::Invalid { field: "limit", message: format!("must be 1 to {MOST}") });
        }
        let filter = ActFilter {
            actor: request.actor.as_deref(),
            act: request.act,
            subject: request.subject.as_deref(),
            from: request.from,
            to: request.to,
            before: request.before,
        };
        // one more says whether there is another page
        let mut acts = self.ledger.in_time(self.ledger.acts(&filter, i64::from(limit) + 1)).await?;
        let more = acts.len() > usize::from(limit);
        acts.truncate(usize::from(limit));
        let next_before = acts.last().filter(|_| more).map(|act| act.id);
        Ok(Acts { acts, next_before })
    }
}
