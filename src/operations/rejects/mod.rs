//! Rejects: records that are not accepted events. Lists, shows, resubmits and discards them.

mod edit;
mod prediction;
mod resubmit;
mod shown;

pub use edit::edited;
pub use prediction::PredictedDisposition;
pub use resubmit::{AdmitRejects, Admitted, Place, Resubmit, Resubmitted, ResubmittedRecord};
pub use shown::{Bytes, Header, Reject, RemovedPayload, ShownReject};

use std::collections::BTreeSet;
use std::str::FromStr;

use axum::http::Method;
use chrono::SecondsFormat;
use clap::builder::PossibleValuesParser;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ApiRequest, Operation, OperationError, Operations, Run};
use crate::event::{Message, RejectCause};
use crate::ledger::{
    ActKind, Disposition, NewAct, RejectFilter, RejectGroup, RejectProperty, RejectRow,
    RejectState, Subject, reject_counts, rejects,
};
use crate::words::UnknownWord;

/// Maximum rejects per page.
const MAX_LISTED: usize = 1_000;
/// Maximum rejects in one changing call, because their bodies are in memory meanwhile.
const MAX_CHANGED: usize = 200;
/// More bytes than any of our records can have.
const WHOLE: i32 = 1 << 30;
/// Bytes of a body in a list; `show` returns the whole body.
const LISTED_BYTES: i32 = 1_024;

const ALL_STATES: &str = "all";

/// The record as it was in the log.
fn as_found(row: &RejectRow) -> Message {
    Message {
        key: row.key.clone(),
        headers: row.headers.clone(),
        payload: row.payload.clone(),
        oversized: row.oversized,
    }
}

/// Filter for rejects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(default)]
pub struct WhichRejects {
    /// Only rejects in this state: `open`, `resubmitted`, `admitted`, `discarded` or `all`.
    /// Default: `open`.
    #[arg(long, help = "Only rejects in this state", default_value = "open",
          value_parser = PossibleValuesParser::new(states()))]
    pub state: String,
    /// Only rejects with this disposition: `rejected`, `conflict` or `held`.
    #[arg(long, alias = "verdict", help = "Only rejects with this disposition",
          value_parser = PossibleValuesParser::new(Disposition::ALL.map(Disposition::as_str)))]
    #[serde(alias = "verdict")]
    pub disposition: Option<String>,
    /// Only rejects with this cause.
    #[arg(long, value_parser = PossibleValuesParser::new(RejectCause::ALL.map(RejectCause::as_str)))]
    pub cause: Option<String>,
    /// Only rejects of this event type.
    #[arg(long = "type", value_name = "TYPE")]
    pub event_type: Option<String>,
}

/// The states, and the word for all of them.
fn states() -> impl Iterator<Item = &'static str> {
    RejectState::ALL.map(RejectState::as_str).into_iter().chain([ALL_STATES])
}

impl Default for WhichRejects {
    fn default() -> Self {
        WhichRejects { state: "open".to_owned(), disposition: None, cause: None, event_type: None }
    }
}

/// List rejects by number, with the first 1024 bytes of each body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ListRejects {
    /// Filter.
    #[command(flatten)]
    #[serde(flatten)]
    pub which: WhichRejects,
    /// Only rejects with a higher number: the next page.
    #[arg(long, value_name = "ID", default_value_t = 0)]
    #[serde(default)]
    pub after: i64,
    /// Maximum number of rejects, 1 to 1000. Default: 100.
    #[arg(long, value_name = "NUMBER", default_value_t = page(), hide_default_value = true)]
    #[serde(default = "page")]
    pub limit: usize,
}

fn page() -> usize {
    100
}

/// A page of rejects, by number, with the first 1024 bytes of each body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RejectPage {
    /// Rejects of this page.
    pub rejects: Vec<Reject>,
    /// `after` of the next page; absent on the last page.
    pub next_after: Option<i64>,
}

/// Count rejects in groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CountRejects {
    /// Filter.
    #[serde(flatten)]
    pub which: WhichRejects,
    /// Property that defines the groups.
    pub by: RejectProperty,
}

/// Groups of rejects, the largest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RejectCounts {
    /// Property that defines the groups.
    pub by: RejectProperty,
    /// Groups of rejects.
    pub groups: Vec<RejectGroup>,
}

/// Show one reject: the whole record, its acts, and its predicted outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ShowReject {
    /// Number of the reject.
    pub id: i64,
}

/// Discard rejects, all or none; accepted events with their ids remain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct DiscardRejects {
    /// Numbers of the rejects: at most 200, all open.
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<i64>,
}

/// Discarded rejects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiscardedRejects {
    /// Numbers of the rejects.
    pub ids: Vec<i64>,
    /// Ids of the acts in the audit log, in the same order.
    pub act_ids: Vec<i64>,
}

impl ApiRequest for ListRejects {
    type Answer = RejectPage;
    const PATH: &'static str = "/api/v1/rejects";
    const ANSWER: &'static str = "One page.";
}

impl Operation for ListRejects {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<RejectPage, OperationError> {
        let filter = filter(&self.which)?;
        if !(1..=MAX_LISTED).contains(&self.limit) {
            return Err(OperationError::Invalid {
                field: "limit",
                message: format!("must be 1 to {MAX_LISTED}"),
            });
        }
        let one_more = i64::try_from(self.limit).unwrap_or(i64::MAX) + 1;
        let mut rows = operations
            .ledger
            .run(async |conn| {
                rejects::list(conn, &filter, self.after, one_more, LISTED_BYTES).await
            })
            .await?;
        let more = rows.len() > self.limit;
        rows.truncate(self.limit);
        let next_after = rows.last().map(|row| row.id).filter(|_| more);
        Ok(RejectPage { rejects: operations.with_acts(rows).await?, next_after })
    }
}

impl ApiRequest for CountRejects {
    type Answer = RejectCounts;
    const PATH: &'static str = "/api/v1/rejects/counts";
    const ANSWER: &'static str = "The groups, the largest first.";
}

impl Operation for CountRejects {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<RejectCounts, OperationError> {
        let filter = filter(&self.which)?;
        let groups = operations
            .ledger
            .run(async |conn| reject_counts::groups(conn, &filter, self.by).await)
            .await?;
        Ok(RejectCounts { by: self.by, groups })
    }
}

impl ApiRequest for ShowReject {
    type Answer = ShownReject;
    const PATH: &'static str = "/api/v1/rejects/{id}";
    const ANSWER: &'static str = "The reject. 404: it does not exist.";
}

impl Operation for ShowReject {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<ShownReject, OperationError> {
        let row = operations.these_rejects(&[self.id]).await?.remove(0);
        operations.shown(row).await
    }
}

impl ApiRequest for DiscardRejects {
    type Answer = DiscardedRejects;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/rejects/discard";
    const ANSWER: &'static str = "The discarded rejects. 409: one of them is not open.";
    const NEEDS_REASON: bool = true;
}

impl Operation for DiscardRejects {
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<DiscardedRejects, OperationError> {
        let rows = operations.these_rejects(&self.ids).await?;
        operations.all_open(&rows).await?;
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let act =
            |id: &i64| actor.act(ActKind::Discard, Subject::Reject(*id), serde_json::json!({}));
        let acts: Vec<NewAct<'_>> = ids.iter().map(act).collect();
        match operations
            .ledger
            .run(async |conn| {
                rejects::discard(conn, &ids, &acts, operations.ledger.clock.now()).await
            })
            .await?
        {
            Some(act_ids) => Ok(DiscardedRejects { ids, act_ids }),
            None => Err(OperationError::Forbidden(
                "another act ended one of them meanwhile; nothing was done".to_owned(),
            )),
        }
    }
}

impl Operations {
    /// The rejects with these numbers, each once.
    async fn these_rejects(&self, ids: &[i64]) -> Result<Vec<RejectRow>, OperationError> {
        let ids: Vec<i64> = ids.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        if ids.is_empty() || ids.len() > MAX_CHANGED {
            return Err(OperationError::Invalid {
                field: "ids",
                message: format!("give from 1 to {MAX_CHANGED} numbers of rejects"),
            });
        }
        let rows = self.ledger.run(async |conn| rejects::by_id(conn, &ids, WHOLE).await).await?;
        match ids.iter().find(|id| !rows.iter().any(|row| row.id == **id)) {
            None => Ok(rows),
            Some(id) => Err(OperationError::NotFound(format!(
                "reject {id} does not exist: `tallyline rejects list` shows the numbers"
            ))),
        }
    }

    /// Refuses rejects whose headers and body retention has removed.
    fn all_kept(rows: &[RejectRow]) -> Result<(), OperationError> {
        match rows.iter().find(|row| row.payload_removed_at.is_some()) {
            None => Ok(()),
            Some(row) => {
                Err(OperationError::Forbidden(format!("{}; nothing was done", replay_instead(row))))
            }
        }
    }

    /// Refuses rejects that are not open; the error names the act that ended them.
    async fn all_open(&self, rows: &[RejectRow]) -> Result<(), OperationError> {
        let Some(ended) = rows.iter().find(|row| row.state != RejectState::Open) else {
            return Ok(());
        };
        let acts = self.ledger.run(async |conn| rejects::acts(conn, &[ended.id]).await).await?;
        let by = acts.iter().find(|act| act.ended_it).map(|act| {
            format!(
                " by {} at {}",
                act.actor,
                act.acted_at.to_rfc3339_opts(SecondsFormat::Millis, true)
            )
        });
        let (id, state) = (ended.id, ended.state);
        Err(OperationError::Forbidden(format!(
            "reject {id} is not open: it was {state}{}; nothing was done",
            by.unwrap_or_default()
        )))
    }
}

/// Why a reject without headers and body cannot be resubmitted, and what to do.
fn replay_instead(row: &RejectRow) -> String {
    let removed = row.payload_removed_at.map(|at| at.date_naive().to_string()).unwrap_or_default();
    let (topic, partition, offset) = (&row.topic, row.partition, row.offset);
    format!(
        "headers and body of reject {} were removed on {removed} under retention.reject_payload_days. If the log still has {topic}/{partition}@{offset}, \
         replay it: `tallyline replay plan --topic {topic}:{partition} --from {offset} --until {}`. If coderd still has the row, the audit names it",
        row.id,
        offset.saturating_add(1),
    )
}

fn filter(which: &WhichRejects) -> Result<RejectFilter, OperationError> {
    let known = |error: UnknownWord| OperationError::Invalid {
        field: "state",
        message: format!("{error}, {ALL_STATES}"),
    };
    let state =
        if which.state == ALL_STATES { None } else { Some(which.state.parse().map_err(known)?) };
    let (disposition, cause) = (
        word("disposition", which.disposition.as_deref())?,
        word("cause", which.cause.as_deref())?,
    );
    Ok(RejectFilter { state, disposition, cause, event_type: which.event_type.clone() })
}

fn word<T: FromStr<Err = UnknownWord>>(
    field: &'static str,
    text: Option<&str>,
) -> Result<Option<T>, OperationError> {
    let wrong = |error: UnknownWord| OperationError::Invalid { field, message: error.to_string() };
    text.map(|text| text.parse().map_err(wrong)).transpose()
}
