//! The rejects desk: records that are no accepted event are listed, shown, passed through the log again, or given up.

mod edit;
mod resubmit;
mod shown;

pub use edit::edited;
pub use resubmit::{Admitted, Foreseen, Place, Resubmit, Resubmitted, ResubmittedRecord};
pub use shown::{Bytes, Header, Reject, ShownReject};

use std::collections::BTreeSet;
use std::str::FromStr;

use chrono::SecondsFormat;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Actor, Desk, OperationError};
use crate::ledger::{ActKind, NewAct, RejectFilter, RejectGroup, RejectProperty, RejectRow, RejectState, Subject};
use crate::words::UnknownWord;

/// Most rejects of one page.
const MOST_LISTED: usize = 1_000;
/// Most rejects of one call that changes them: their bodies are in memory meanwhile.
const MOST_CHANGED: usize = 200;
/// More than any record of ours can have.
const WHOLE: i32 = 1 << 30;
/// Of a listed reject's body so many bytes are told; `show` tells it whole.
const LISTED_BYTES: i32 = 1_024;

/// Which rejects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct WhichRejects {
    /// open (where it is not given), resubmitted, admitted, discarded, or all.
    pub state: String,
    /// rejected, conflict or held; absent: any.
    pub verdict: Option<String>,
    /// Why, in one word, such as json; absent: any.
    pub cause: Option<String>,
    /// The event's type; absent: any.
    pub event_type: Option<String>,
}

impl Default for WhichRejects {
    fn default() -> Self {
        WhichRejects { state: "open".to_owned(), verdict: None, cause: None, event_type: None }
    }
}

/// A page of rejects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ListRejects {
    /// Which.
    #[serde(flatten)]
    pub which: WhichRejects,
    /// Only those with a higher number.
    #[serde(default)]
    pub after: i64,
    /// At most so many, from 1 to 1000; 100 where it is not given.
    #[serde(default = "page")]
    pub limit: usize,
}

fn page() -> usize {
    100
}

/// A page of rejects, by number. Of each body the first 1024 bytes are told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RejectPage {
    /// The rejects.
    pub rejects: Vec<Reject>,
    /// The `after` of the next page; absent where this is the last.
    pub next_after: Option<i64>,
}

/// Rejects in groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CountRejects {
    /// Which.
    #[serde(flatten)]
    pub which: WhichRejects,
    /// What the groups have in common.
    pub by: RejectProperty,
}

/// Rejects in groups, the largest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RejectCounts {
    /// What the groups have in common.
    pub by: RejectProperty,
    /// The groups.
    pub groups: Vec<RejectGroup>,
}

/// Rejects to be given up. An accepted event under the same id stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiscardRejects {
    /// Their numbers: at most 200, all open.
    pub ids: Vec<i64>,
}

/// What was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiscardedRejects {
    /// The rejects' numbers.
    pub ids: Vec<i64>,
    /// The acts in the audit trail, in the same order.
    pub act_ids: Vec<i64>,
}

impl Desk {
    /// A page of rejects.
    pub async fn list_rejects(&self, request: &ListRejects) -> Result<RejectPage, OperationError> {
        let filter = filter(&request.which)?;
        if !(1..=MOST_LISTED).contains(&request.limit) {
            return Err(OperationError::Invalid { field: "limit", message: format!("must lie between 1 and {MOST_LISTED}") });
        }
        let one_more = i64::try_from(request.limit).unwrap_or(i64::MAX) + 1;
        let mut rows = self.ledger.in_time(self.ledger.rejects(&filter, request.after, one_more, LISTED_BYTES)).await?;
        let more = rows.len() > request.limit;
        rows.truncate(request.limit);
        let next_after = rows.last().map(|row| row.id).filter(|_| more);
        Ok(RejectPage { rejects: self.with_acts(rows).await?, next_after })
    }

    /// Rejects in groups.
    pub async fn count_rejects(&self, request: &CountRejects) -> Result<RejectCounts, OperationError> {
        let groups = self.ledger.in_time(self.ledger.reject_groups(&filter(&request.which)?, request.by)).await?;
        Ok(RejectCounts { by: request.by, groups })
    }

    /// One reject, whole, and what would become of it now.
    pub async fn show_reject(&self, id: i64) -> Result<ShownReject, OperationError> {
        let row = self.these_rejects(&[id]).await?.remove(0);
        self.shown(row).await
    }

    /// Gives up rejects, all or none. They stay in the ledger as discarded.
    ///
    /// # Errors
    /// [`OperationError::NotFound`]; [`OperationError::Forbidden`] where one is not open; [`OperationError::Invalid`] without a reason; the
    /// ledger's.
    pub async fn discard_rejects(&self, request: &DiscardRejects, actor: &Actor) -> Result<DiscardedRejects, OperationError> {
        actor.require_reason()?;
        let rows = self.these_rejects(&request.ids).await?;
        self.all_open(&rows).await?;
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let act = |id: &i64| actor.act(ActKind::Discard, Subject::Reject(*id), serde_json::json!({}));
        let acts: Vec<NewAct<'_>> = ids.iter().map(act).collect();
        match self.ledger.in_time(self.ledger.discard_rejects(&ids, &acts)).await? {
            Some(act_ids) => Ok(DiscardedRejects { ids, act_ids }),
            None => Err(OperationError::Forbidden("one of them was ended by somebody else meanwhile; nothing was done".to_owned())),
        }
    }

    /// The rejects of these numbers, each once.
    async fn these_rejects(&self, ids: &[i64]) -> Result<Vec<RejectRow>, OperationError> {
        let ids: Vec<i64> = ids.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        if ids.is_empty() || ids.len() > MOST_CHANGED {
            return Err(OperationError::Invalid { field: "ids", message: format!("give from 1 to {MOST_CHANGED} numbers of rejects") });
        }
        let rows = self.ledger.in_time(self.ledger.rejects_of(&ids, WHOLE)).await?;
        match ids.iter().find(|id| !rows.iter().any(|row| row.id == **id)) {
            None => Ok(rows),
            Some(id) => Err(OperationError::NotFound(format!("there is no reject {id}: `tallyline rejects list` shows their numbers"))),
        }
    }

    /// Refuses rejects that an act has ended, and says which act of whom.
    async fn all_open(&self, rows: &[RejectRow]) -> Result<(), OperationError> {
        let Some(ended) = rows.iter().find(|row| row.state != RejectState::Open) else { return Ok(()) };
        let acts = self.ledger.in_time(self.ledger.reject_acts(&[ended.id])).await?;
        let by = acts
            .iter()
            .find(|act| act.ended_it)
            .map(|act| format!(" by {} at {}", act.actor, act.acted_at.to_rfc3339_opts(SecondsFormat::Millis, true)));
        let (id, state) = (ended.id, ended.state);
        Err(OperationError::Forbidden(format!("reject {id} is no longer open: it was {state}{}; nothing was done", by.unwrap_or_default())))
    }
}

fn filter(which: &WhichRejects) -> Result<RejectFilter, OperationError> {
    let known = |error: UnknownWord| OperationError::Invalid { field: "state", message: format!("{error}, all") };
    let state = if which.state == "all" { None } else { Some(which.state.parse().map_err(known)?) };
    let (verdict, cause) = (word("verdict", which.verdict.as_deref())?, word("cause", which.cause.as_deref())?);
    Ok(RejectFilter { state, verdict, cause, event_type: which.event_type.clone() })
}

fn word<T: FromStr<Err = UnknownWord>>(field: &'static str, text: Option<&str>) -> Result<Option<T>, OperationError> {
    let wrong = |error: UnknownWord| OperationError::Invalid { field, message: error.to_string() };
    text.map(|text| text.parse().map_err(wrong)).transpose()
}
