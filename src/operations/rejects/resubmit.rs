//! Resubmits rejects through the log, with their own event ids.
//!
//! The log and the ledger have no common transaction. This order makes a resubmission safe:
//!
//! 1. Record the acts.
//! 2. Append the records, and wait until the log acknowledges them.
//! 3. End the rejects.
//!
//! After a crash in between, the rejects are still open and nothing is lost. The audit log then
//! contains an act that ended nothing. At worst, the next resubmission appends the same event
//! again, and the ledger counts a duplicate. With another edit it is a conflict, and the first
//! event remains.
//!
//! The reject keeps the place of its record in the log. If the log loses the record unread,
//! `recover --lost log` reopens the reject.

use std::collections::BTreeMap;

use axum::http::Method;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::prediction::{News, PredictedDisposition, Prediction};
use super::{WHOLE, WhichRejects, as_found, edit};
use crate::event::{MAX_PAYLOAD_BYTES, Signer, Topic, TopicPartition, UsageType};
use crate::ledger::{
    ActKind, Disposition, NO_SIGNING_KEY, NewAct, PassedReject, RejectProperty, RejectRow,
    RejectState, Subject, cutover, generations, reject_counts, rejects,
};
use crate::operations::operation::counting;
use crate::operations::{
    Actor, ApiRequest, Operation, OperationError, Operations, Run, given_file,
};

/// Rejects admitted in one step.
const ADMITTED_AT_A_TIME: i64 = 200;

/// Maximum bytes of a file with an edit: a body with the attributes of a whole CloudEvent.
const MAX_EDIT_BYTES: usize = 2 * MAX_PAYLOAD_BYTES;

/// Resubmit rejects through the log, all or none, with their own event ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct Resubmit {
    /// Numbers of the rejects: at most 200, all open unless forced.
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<i64>,
    /// Only for a single reject: its new body, or a whole CloudEvent in JSON, which also replaces
    /// the headers. Readable ids, sources and types must not change.
    #[arg(long, value_name = "FILE", value_parser = edit_in)]
    pub edit: Option<String>,
    /// Also resubmit records that would be rejected again, but never conflicts. Also resubmit ended
    /// rejects while no event with their id is accepted.
    #[arg(long)]
    pub force: bool,
    /// Only predict the outcome.
    #[arg(long)]
    pub dry_run: bool,
}

/// Reads the edit in this file.
fn edit_in(path: &str) -> Result<String, String> {
    given_file::text(path.as_ref(), MAX_EDIT_BYTES)
}

/// Resubmit held records whose type this version knows, or whose deployment is registered.
///
/// A process with the role consume does this by itself. After an interruption, the same call
/// resumes. If two processes do it at the same time, a record may be appended twice: the second one
/// is a duplicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct AdmitRejects {}

/// Result of a resubmission.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resubmitted {
    /// Whether this was only a prediction.
    pub dry_run: bool,
    /// Result for each reject.
    pub records: Vec<ResubmittedRecord>,
}

/// Result for one reject.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResubmittedRecord {
    /// Number of the reject.
    pub id: i64,
    /// Event id of the resubmitted record; absent if it cannot be read.
    pub event_id: Option<String>,
    /// Predicted outcome.
    pub predicted: PredictedDisposition,
    /// Reason, if the predicted outcome is not `accepted`.
    pub reason: Option<String>,
    /// Place of the record in the log; absent if nothing was appended.
    pub place: Option<Place>,
    /// Id of the act in the audit log.
    pub act_id: Option<i64>,
    /// Whether this act ended the reject. False if another act ended it meanwhile; the record is in
    /// the log nevertheless.
    pub ended: bool,
}

/// A place in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// Name of the topic.
    pub topic: String,
    /// Number of the partition.
    pub partition: i32,
    /// Offset of the record.
    pub offset: i64,
}

/// Result for held records whose type this version knows, or whose deployment is now registered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Admitted {
    /// Held records that were resubmitted, or whose event was already accepted.
    pub records: u64,
    /// Resubmitted records that are not expected to become accepted events. They are now separate
    /// rejects with their own reason.
    pub refused: u64,
    /// Held records whose type is still not known. They remain held.
    pub left: u64,
}

/// A reject ready for resubmission.
struct Prepared {
    row: RejectRow,
    edit: Option<String>,
    prediction: Prediction,
}

impl ApiRequest for Resubmit {
    type Answer = Resubmitted;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/rejects/resubmit";
    const ANSWER: &'static str =
        "The outcome of each reject. 409: one of them is not open, or would be refused again.";
}

impl Operation for Resubmit {
    /// On an error of the log or the ledger, the acknowledged rejects have ended, and a retry is
    /// safe.
    async fn run(
        &self,
        Run { operations, actor, .. }: Run<'_>,
    ) -> Result<Resubmitted, OperationError> {
        let rows = operations.these_rejects(&self.ids).await?;
        if self.edit.is_some() && rows.len() != 1 {
            return Err(OperationError::Invalid {
                field: "edit",
                message: "an edit is for one reject".to_owned(),
            });
        }
        if !self.force {
            operations.all_open(&rows).await?;
        }
        Operations::all_kept(&rows)?;
        let mut news = News::new();
        let mut prepared = Vec::with_capacity(rows.len());
        for row in rows {
            let message = match &self.edit {
                Some(text) => edit::edited(&as_found(&row), text)?,
                None => as_found(&row),
            };
            let prediction = operations.predict_disposition(&message, &mut news).await?;
            prepared.push(Prepared { row, edit: self.edit.clone(), prediction });
        }
        if self.dry_run {
            return Ok(Resubmitted {
                dry_run: true,
                records: prepared.iter().map(|one| record(one, None, None, false)).collect(),
            });
        }
        for one in &prepared {
            allowed(one, self.force)?;
        }
        let records = operations
            .pass_through(ActKind::Resubmit, RejectState::Resubmitted, &prepared, actor)
            .await?;
        Ok(Resubmitted { dry_run: false, records })
    }
}

impl ApiRequest for AdmitRejects {
    type Answer = Admitted;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/rejects/admit";
    const ANSWER: &'static str = "The numbers of records.";
    const IS_LONG: bool = true;
}

impl Operation for AdmitRejects {
    /// Also admits records whose deployment is now registered. Their predicted outcome does not
    /// matter, because the reason to hold them has ended.
    async fn run(
        &self,
        Run { operations, actor, progress, stop }: Run<'_>,
    ) -> Result<Admitted, OperationError> {
        let progress =
            counting(("admitting", "records"), operations.held_of_known_types().await?, progress);
        let (mut admitted, mut after) = (Admitted::default(), 0);
        loop {
            if stop.is_cancelled() {
                return Err(OperationError::Interrupted);
            }
            let ids = operations
                .ledger
                .run(async |conn| rejects::admissible(conn, after, ADMITTED_AT_A_TIME).await)
                .await?;
            let Some(last) = ids.last() else { return Ok(admitted) };
            after = *last;
            let mut news = News::new();
            let mut prepared = Vec::with_capacity(ids.len());
            for row in
                operations.ledger.run(async |conn| rejects::by_id(conn, &ids, WHOLE).await).await?
            {
                let prediction = operations.predict_disposition(&as_found(&row), &mut news).await?;
                match prediction.disposition {
                    PredictedDisposition::Held => admitted.left += 1,
                    PredictedDisposition::Accepted | PredictedDisposition::Duplicate => {
                        admitted.records += 1
                    }
                    PredictedDisposition::Conflict | PredictedDisposition::Rejected => {
                        (admitted.records, admitted.refused) =
                            (admitted.records + 1, admitted.refused + 1)
                    }
                }
                if prediction.disposition != PredictedDisposition::Held {
                    prepared.push(Prepared { row, edit: None, prediction });
                }
            }
            operations
                .pass_through(ActKind::Admit, RejectState::Admitted, &prepared, actor)
                .await?;
            progress(u64::try_from(ids.len()).unwrap_or_default());
        }
    }
}

impl Operations {
    /// The number of held records whose type this version knows.
    async fn held_of_known_types(&self) -> Result<u64, OperationError> {
        let held = super::filter(&WhichRejects {
            disposition: Some(Disposition::Held.to_string()),
            ..WhichRejects::default()
        })?;
        let groups = self
            .ledger
            .run(async |conn| reject_counts::groups(conn, &held, RejectProperty::Type).await)
            .await?;
        let known = groups.iter().filter(|group| {
            group.value.as_ref().is_some_and(|value| value.parse::<UsageType>().is_ok())
        });
        Ok(known.map(|group| u64::try_from(group.records).unwrap_or_default()).sum())
    }

    /// Records acts, appends records, ends rejects: see the top of this file.
    async fn pass_through(
        &self,
        kind: ActKind,
        state: RejectState,
        prepared: &[Prepared],
        actor: &Actor,
    ) -> Result<Vec<ResubmittedRecord>, OperationError> {
        if self
            .ledger
            .run(async |conn| cutover::needs_signing_key(conn, self.log.signatures()).await)
            .await?
        {
            return Err(OperationError::Forbidden(NO_SIGNING_KEY.to_owned()));
        }
        let all_generations = self.ledger.run(generations::all).await?;
        let acts: Vec<NewAct<'_>> = prepared
            .iter()
            .map(|one| actor.act(kind, Subject::Reject(one.row.id), detail(one)))
            .collect();
        let act_ids = self
            .ledger
            .run(async |conn| rejects::begin_acts(conn, &acts, self.ledger.clock.now()).await)
            .await?;
        let (places, fault) = self.append(prepared).await;
        let done: Vec<PassedReject> = prepared
            .iter()
            .zip(&act_ids)
            .enumerate()
            .map(|(index, (one, act_id))| {
                (
                    one,
                    PassedReject {
                        id: one.row.id,
                        act_id: *act_id,
                        place: places.get(&index).copied(),
                    },
                )
            })
            .filter(|(one, passed)| {
                one.prediction.disposition == PredictedDisposition::Duplicate
                    || passed.place.is_some()
            })
            .map(|(_, passed)| passed)
            .collect();
        let ended = self
            .ledger
            .run(async |conn| {
                rejects::end(conn, &done, &prepared_states(prepared), state, all_generations).await
            })
            .await?;
        if let Some(fault) = fault {
            return Err(fault);
        }
        let records = prepared.iter().zip(act_ids).enumerate();
        Ok(records
            .map(|(index, (one, act_id))| {
                record(one, places.get(&index).copied(), Some(act_id), ended.contains(&one.row.id))
            })
            .collect())
    }

    /// Appends all records except duplicates. Returns the place of each acknowledged record by
    /// index, and the first fault.
    async fn append(
        &self,
        prepared: &[Prepared],
    ) -> (BTreeMap<usize, (TopicPartition, i64)>, Option<OperationError>) {
        let mut by_topic: BTreeMap<Topic, Vec<usize>> = BTreeMap::new();
        let (mut places, mut fault) = (BTreeMap::new(), None);
        for (index, one) in prepared
            .iter()
            .enumerate()
            .filter(|(_, one)| one.prediction.disposition != PredictedDisposition::Duplicate)
        {
            match one
                .prediction
                .event
                .map(|(_, topic)| topic)
                .or_else(|| one.row.topic.parse::<Topic>().ok())
            {
                Some(topic) => by_topic.entry(topic).or_default().push(index),
                None => {
                    fault = fault.or_else(|| {
                        Some(OperationError::NotFound(format!(
                            "topic {}: it does not exist any more",
                            one.row.topic
                        )))
                    })
                }
            }
        }
        for (topic, indices) in by_topic {
            let messages =
                indices.iter().map(|index| prepared[*index].prediction.message.clone()).collect();
            let placed = match self.log.append_signed(Signer::Operator, topic, messages).await {
                Ok(placed) => placed.into_iter().map(Some).collect(),
                Err(error) => {
                    fault = fault.or(Some(error.cause.into()));
                    error.placed
                }
            };
            for (index, place) in indices.into_iter().zip(placed) {
                if let Some((partition, offset)) = place {
                    places.insert(index, (TopicPartition { topic, partition }, offset));
                }
            }
        }
        (places, fault)
    }
}

/// The states that the rejects had before this call: a reject ends only if its state has not
/// changed.
fn prepared_states(prepared: &[Prepared]) -> Vec<RejectState> {
    RejectState::ALL
        .into_iter()
        .filter(|state| prepared.iter().any(|one| one.row.state == *state))
        .collect()
}

fn allowed(one: &Prepared, force: bool) -> Result<(), OperationError> {
    let id = one.row.id;
    let reason = one.prediction.reason.as_deref().unwrap_or_default();
    let refused = match one.prediction.disposition {
        _ if one.prediction.message.unreadable_batch().is_some() => {
            format!(
                "reject {id} is the placeholder of records that cannot be read ({reason}): discard it"
            )
        }
        _ if one.prediction.message.oversized.is_some() => {
            format!(
                "reject {id} is kept only in part ({reason}): give the whole record with --edit, or discard it"
            )
        }
        PredictedDisposition::Conflict => format!(
            "reject {id} would be a conflict again: {reason}; discard it with `tallyline rejects discard`"
        ),
        PredictedDisposition::Duplicate if one.row.state != RejectState::Open => {
            format!("reject {id} was {}: {reason}", one.row.state)
        }
        PredictedDisposition::Rejected if !force => {
            format!("reject {id} would be rejected again: {reason}; correct it with --edit")
        }
        PredictedDisposition::Held if !force => format!(
            "reject {id} would be held again: {reason}; it is admitted when its type is known and its deployment registered"
        ),
        PredictedDisposition::Accepted
        | PredictedDisposition::Duplicate
        | PredictedDisposition::Rejected
        | PredictedDisposition::Held => {
            return Ok(());
        }
    };
    Err(OperationError::Forbidden(format!("{refused}; nothing was done")))
}

fn detail(one: &Prepared) -> serde_json::Value {
    let mut detail = serde_json::json!({ "predicted": one.prediction.disposition });
    if let (Some(id), Some((deployment, _))) = (&one.prediction.event_id, one.prediction.event) {
        (detail["event_id"], detail["deployment_id"]) =
            (id.clone().into(), deployment.to_string().into());
    }
    if let Some(edit) = &one.edit {
        detail["edit"] = edit.clone().into();
    }
    if one.row.state != RejectState::Open {
        detail["was"] = one.row.state.as_str().into();
    }
    detail
}

fn record(
    one: &Prepared,
    place: Option<(TopicPartition, i64)>,
    act_id: Option<i64>,
    ended: bool,
) -> ResubmittedRecord {
    let Prediction { disposition, reason, event_id, .. } = &one.prediction;
    let place = place.map(|(at, offset)| Place {
        topic: at.topic.name().to_owned(),
        partition: at.partition,
        offset,
    });
    ResubmittedRecord {
        id: one.row.id,
        event_id: event_id.clone(),
        predicted: *disposition,
        reason: reason.clone(),
        place,
        act_id,
        ended,
    }
}
