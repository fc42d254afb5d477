//! Rejects go through the log again, under their own event ids.
//!
//! The log and the ledger have no transaction in common, so the order makes it safe:
//!
//! 1. The acts are recorded.
//! 2. The records are appended and acknowledged.
//! 3. The rejects end.
//!
//! After a crash in between, the rejects are still open and nothing is lost. The audit trail then has an act that ended nothing.
//! The next resubmission appends at worst the same event again, which the ledger counts as a duplicate. With another edit it is a
//! conflict, and the first event remains.
//!
//! The place in the log is kept with the reject: if the log loses the record unread, `recover --lost kafka` opens the reject again.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{WHOLE, edit};
use crate::consumer;
use crate::event::{Digest, Message, Signer, Topic, TopicPartition};
use crate::ledger::{ActKind, NO_SIGNING_KEY, NewAct, PassedReject, Refusal, RejectRow, RejectState, Subject, Verdict};
use crate::log::Record;
use crate::operations::{Actor, Desk, OperationError};

/// Rejects that are admitted at a time.
const ADMITTED_AT_A_TIME: i64 = 200;

/// Rejects to go through the log again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Resubmit {
    /// Their numbers: at most 200, all open unless forced.
    pub ids: Vec<i64>,
    /// For one reject: the body to take the place of its own; or a whole CloudEvent in JSON, which takes the place of the headers, too. Id,
    /// source and type stay what they are, where they could be read.
    pub edit: Option<String>,
    /// Also what would be refused again, though never what is in conflict with an accepted event; also what was ended, while no event of
    /// its id is accepted.
    pub force: bool,
    /// Only say what would become of it.
    pub dry_run: bool,
}

/// What would become of a record that came from the log now. What PostgreSQL itself refused before cannot be foreseen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Foreseen {
    /// A new event.
    Accepted,
    /// Its event is accepted already: nothing would change, and nothing is appended.
    Duplicate,
    /// Another event is accepted under its id, and stands.
    Conflict,
    /// No event.
    Rejected,
    /// Usage of a type that this version does not know.
    Held,
}

/// What went through the log again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resubmitted {
    /// Nothing was done.
    pub dry_run: bool,
    /// Each reject.
    pub records: Vec<ResubmittedRecord>,
}

/// One reject that went through the log again, or would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResubmittedRecord {
    /// The reject's number.
    pub id: i64,
    /// The event id under which it goes; absent where it cannot be read.
    pub event_id: Option<String>,
    /// What is foreseen for it.
    pub foreseen: Foreseen,
    /// Why, where that is not accepted.
    pub reason: Option<String>,
    /// Where the log has it now; absent where nothing was appended.
    pub place: Option<Place>,
    /// The act in the audit trail.
    pub act_id: Option<i64>,
    /// Whether the reject has ended with it. False: somebody else ended it meanwhile, and the record is in the log all the same.
    pub ended: bool,
}

/// A place in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// The topic's name.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

/// What came of held records whose type this version knows, or whose deployment is registered by now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Admitted {
    /// Held records that went through the log again, or whose event was accepted already.
    pub records: u64,
    /// Of these, those that are foreseen as no accepted event: they are rejects of their own now, and say why.
    pub refused: u64,
    /// Held records that still cannot be told to be of a known type, and stay as they are.
    pub left: u64,
}

/// What is foreseen for a message, and as which message of which topic it goes.
pub(super) struct Foresight {
    pub what: Foreseen,
    pub reason: Option<String>,
    event_id: Option<String>,
    /// Whose event it would be, and in which topic: none where it is no event.
    event: Option<(Uuid, Topic)>,
    message: Message,
}

/// A reject on its way.
struct Prepared {
    row: RejectRow,
    edit: Option<String>,
    foresight: Foresight,
}

/// Events that are foreseen as new within one call.
type News = HashMap<(Uuid, String), Digest>;

/// The record as the log had it.
pub(super) fn as_found(row: &RejectRow) -> Message {
    Message { key: row.key.clone(), headers: row.headers.clone(), payload: row.payload.clone(), oversized: row.oversized }
}

impl Desk {
    /// Passes rejects through the log again, all or none of them; with an edit, one.
    ///
    /// # Errors
    /// [`OperationError::NotFound`]; [`OperationError::Forbidden`] where one is not open or would be refused again; [`OperationError::Invalid`];
    /// the log's and the ledger's: then those that are acknowledged have ended, and the same call again is safe.
    pub async fn resubmit_rejects(&self, request: &Resubmit, actor: &Actor) -> Result<Resubmitted, OperationError> {
        let rows = self.these_rejects(&request.ids).await?;
        if request.edit.is_some() && rows.len() != 1 {
            return Err(OperationError::Invalid { field: "edit", message: "an edit is for one reject".to_owned() });
        }
        if !request.force {
            self.all_open(&rows).await?;
        }
        let mut news = News::new();
        let mut prepared = Vec::with_capacity(rows.len());
        for row in rows {
            let message = match &request.edit {
                Some(text) => edit::edited(&as_found(&row), text)?,
                None => as_found(&row),
            };
            let foresight = self.foreseen(&message, &mut news).await?;
            prepared.push(Prepared { row, edit: request.edit.clone(), foresight });
        }
        if request.dry_run {
            return Ok(Resubmitted { dry_run: true, records: prepared.iter().map(|one| record(one, None, None, false)).collect() });
        }
        for one in &prepared {
            allowed(one, request.force)?;
        }
        let records = self.pass_through(ActKind::Resubmit, RejectState::Resubmitted, &prepared, actor).await?;
        Ok(Resubmitted { dry_run: false, records })
    }

    /// Passes held records through the log whose type this version knows, or whose deployment is registered by now.
    /// They go whatever is foreseen for them, since the reason to hold them has ended. `progress` gets the number of records examined.
    /// If two processes admit at once, a record may go twice; the second one is a duplicate.
    ///
    /// # Errors
    /// [`OperationError::Interrupted`], the log's and the ledger's; the same call goes on from there.
    pub async fn admit_rejects(&self, actor: &Actor, progress: impl Fn(u64), stop: &CancellationToken) -> Result<Admitted, OperationError> {
        let (mut admitted, mut after) = (Admitted::default(), 0);
        loop {
            if stop.is_cancelled() {
                return Err(OperationError::Interrupted);
            }
            let ids = self.ledger.in_time(self.ledger.admissible(after, ADMITTED_AT_A_TIME)).await?;
            let Some(last) = ids.last() else { return Ok(admitted) };
            after = *last;
            let mut news = News::new();
            let mut prepared = Vec::with_capacity(ids.len());
            for row in self.ledger.in_time(self.ledger.rejects_of(&ids, WHOLE)).await? {
                let foresight = self.foreseen(&as_found(&row), &mut news).await?;
                match foresight.what {
                    Foreseen::Held => admitted.left += 1,
                    Foreseen::Accepted | Foreseen::Duplicate => admitted.records += 1,
                    Foreseen::Conflict | Foreseen::Rejected => {
                        (admitted.records, admitted.refused) = (admitted.records + 1, admitted.refused + 1)
                    }
                }
                if foresight.what != Foreseen::Held {
                    prepared.push(Prepared { row, edit: None, foresight });
                }
            }
            self.pass_through(ActKind::Admit, RejectState::Admitted, &prepared, actor).await?;
            progress(u64::try_from(ids.len()).unwrap_or_default());
        }
    }

    /// What would become of a message that came from the log now. `news` are the events that this call has found to be new so far.
    pub(super) async fn foreseen(&self, message: &Message, news: &mut News) -> Result<Foresight, OperationError> {
        let record = Record { offset: 0, timestamp: self.ledger.clock.now(), message: message.clone() };
        let mut message = message.clone();
        let event = match consumer::read(record).event {
            Ok(event) => event,
            Err(refusal) => {
                let what = if refusal.verdict == Verdict::Held { Foreseen::Held } else { Foreseen::Rejected };
                let event_id = crate::event::Traces::of(&message).id;
                return Ok(Foresight { what, reason: Some(refusal.detail), event_id, event: None, message });
            }
        };
        if self.ledger.in_time(self.ledger.source(event.deployment)).await?.is_none() {
            let reason = Some(Refusal::unregistered(event.deployment).detail);
            return Ok(Foresight { what: Foreseen::Held, reason, event_id: Some(event.id()), event: None, message });
        }
        // one key is one partition, whoever wrote the record first
        message.key = Some(event.key().into_bytes());
        let (id, digest) = (event.id(), event.digest());
        let accepted = self.ledger.in_time(self.ledger.accepted(event.deployment, &id)).await?.map(|(_, digest)| digest);
        let known = accepted.or_else(|| news.get(&(event.deployment, id.clone())).copied());
        let (what, reason) = match known {
            None => {
                news.insert((event.deployment, id.clone()), digest);
                (Foreseen::Accepted, None)
            }
            Some(known) if known == digest => (Foreseen::Duplicate, Some(format!("{id} is accepted already, with the same content"))),
            Some(_) => (Foreseen::Conflict, Some(format!("{id} is accepted with other content; the accepted event remains"))),
        };
        Ok(Foresight { what, reason, event_id: Some(id), event: Some((event.deployment, event.topic())), message })
    }

    /// Acts first, then the log, then the ends: see the head of this file.
    async fn pass_through(
        &self,
        kind: ActKind,
        state: RejectState,
        prepared: &[Prepared],
        actor: &Actor,
    ) -> Result<Vec<ResubmittedRecord>, OperationError> {
        if self.ledger.in_time(self.ledger.needs_signing_key(self.log.signatures())).await? {
            return Err(OperationError::Forbidden(NO_SIGNING_KEY.to_owned()));
        }
        let lives = self.ledger.in_time(self.ledger.lives()).await?;
        let acts: Vec<NewAct<'_>> = prepared.iter().map(|one| actor.act(kind, Subject::Reject(one.row.id), detail(one))).collect();
        let act_ids = self.ledger.in_time(self.ledger.begin_acts(&acts)).await?;
        let (places, fault) = self.append(prepared).await;
        let done: Vec<PassedReject> = prepared
            .iter()
            .zip(&act_ids)
            .enumerate()
            .map(|(index, (one, act_id))| (one, PassedReject { id: one.row.id, act_id: *act_id, place: places.get(&index).copied() }))
            .filter(|(one, passed)| one.foresight.what == Foreseen::Duplicate || passed.place.is_some())
            .map(|(_, passed)| passed)
            .collect();
        let ended = self.ledger.in_time(self.ledger.end_rejects(&done, &prepared_states(prepared), state, lives)).await?;
        if let Some(fault) = fault {
            return Err(fault);
        }
        let records = prepared.iter().zip(act_ids).enumerate();
        Ok(records
            .map(|(index, (one, act_id))| record(one, places.get(&index).copied(), Some(act_id), ended.contains(&one.row.id)))
            .collect())
    }

    /// Appends what is no duplicate. Answers where the log has each that it acknowledged, by index, and the first fault.
    async fn append(&self, prepared: &[Prepared]) -> (BTreeMap<usize, (TopicPartition, i64)>, Option<OperationError>) {
        let mut by_topic: BTreeMap<Topic, Vec<usize>> = BTreeMap::new();
        let (mut places, mut fault) = (BTreeMap::new(), None);
        for (index, one) in prepared.iter().enumerate().filter(|(_, one)| one.foresight.what != Foreseen::Duplicate) {
            match one.foresight.event.map(|(_, topic)| topic).or_else(|| one.row.topic.parse::<Topic>().ok()) {
                Some(topic) => by_topic.entry(topic).or_default().push(index),
                None => fault = fault.or_else(|| Some(OperationError::NotFound(format!("there is no topic {} any more", one.row.topic)))),
            }
        }
        for (topic, indices) in by_topic {
            let messages = indices.iter().map(|index| prepared[*index].foresight.message.clone()).collect();
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

/// A reject ends only if it still is as it was when this began.
fn prepared_states(prepared: &[Prepared]) -> Vec<RejectState> {
    RejectState::ALL.into_iter().filter(|state| prepared.iter().any(|one| one.row.state == *state)).collect()
}

fn allowed(one: &Prepared, force: bool) -> Result<(), OperationError> {
    let id = one.row.id;
    let reason = one.foresight.reason.as_deref().unwrap_or_default();
    let refused = match one.foresight.what {
        _ if one.foresight.message.unreadable_batch().is_some() => {
            format!("reject {id} is the placeholder of records that cannot be read ({reason}): discard it")
        }
        _ if one.foresight.message.oversized.is_some() => {
            format!("reject {id} is kept only in part ({reason}): give the whole record with --edit, or discard it")
        }
        Foreseen::Conflict => format!("reject {id} would be a conflict again: {reason}; `tallyline rejects discard` gives it up"),
        Foreseen::Duplicate if one.row.state != RejectState::Open => format!("reject {id} was {}: {reason}", one.row.state),
        Foreseen::Rejected if !force => format!("reject {id} would be rejected again: {reason}; mend it with --edit"),
        Foreseen::Held if !force => format!("reject {id} would be held again: {reason}; what is missing admits it once it is there"),
        Foreseen::Accepted | Foreseen::Duplicate | Foreseen::Rejected | Foreseen::Held => return Ok(()),
    };
    Err(OperationError::Forbidden(format!("{refused}; nothing was done")))
}

fn detail(one: &Prepared) -> serde_json::Value {
    let mut detail = serde_json::json!({ "foreseen": one.foresight.what });
    if let (Some(id), Some((deployment, _))) = (&one.foresight.event_id, one.foresight.event) {
        (detail["event_id"], detail["deployment_id"]) = (id.clone().into(), deployment.to_string().into());
    }
    if let Some(edit) = &one.edit {
        detail["edit"] = edit.clone().into();
    }
    if one.row.state != RejectState::Open {
        detail["was"] = one.row.state.as_str().into();
    }
    detail
}

fn record(one: &Prepared, place: Option<(TopicPartition, i64)>, act_id: Option<i64>, ended: bool) -> ResubmittedRecord {
    let Foresight { what, reason, event_id, .. } = &one.foresight;
    let place = place.map(|(at, offset)| Place { topic: at.topic.name().to_owned(), partition: at.partition, offset });
    ResubmittedRecord { id: one.row.id, event_id: event_id.clone(), foreseen: *what, reason: reason.clone(), place, act_id, ended }
}
