//! Lists the audit trail.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Desk, OperationError};
use crate::ledger::{Act, ListActs, acts};

/// Acts of one page: the default and the maximum.
const PAGE: u16 = 100;
const MOST: u16 = 1000;

/// A page of the audit trail, the latest act first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Acts {
    /// Acts of this page.
    pub acts: Vec<Act>,
    /// `before` of the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_before: Option<i64>,
}

impl Desk {
    pub async fn acts(&self, request: &ListActs) -> Result<Acts, OperationError> {
        let limit = request.limit.unwrap_or(PAGE);
        if !(1..=MOST).contains(&limit) {
            return Err(OperationError::Invalid { field: "limit", message: format!("must be 1 to {MOST}") });
        }
        // one act more than the limit shows whether another page exists
        let mut acts = self.ledger.run(async |conn| acts::list(conn, request, i64::from(limit) + 1).await).await?;
        let more = acts.len() > usize::from(limit);
        acts.truncate(usize::from(limit));
        let next_before = acts.last().filter(|_| more).map(|act| act.id);
        Ok(Acts { acts, next_before })
    }
}
