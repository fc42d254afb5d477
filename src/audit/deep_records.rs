//! Compares the records of a page with their rows.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;
use uuid::Uuid;

use super::deep_findings::DeepFindings;
use crate::event::{self, Digest, Event, Topic, TopicPartition};
use crate::ledger::{
    Arrival, BatchKind, Difference, Disposition, KeptEvent, KeptReject, Refusal, RejectState,
};

/// The ledger's rows of a page of records.
#[derive(Default)]
pub(super) struct PageRows {
    /// Events accepted from the page, by offset: more than one only after a change by hand.
    pub here: BTreeMap<i64, Vec<KeptEvent>>,
    /// Events with ids of the page that were accepted from another record.
    pub elsewhere: HashMap<(Uuid, String), KeptEvent>,
    /// Contents of these events before and after corrections. A record with one is a duplicate.
    pub corrected: HashSet<(Uuid, String, Digest)>,
    pub rejects: BTreeMap<i64, KeptReject>,
}

impl PageRows {
    /// The key of the record's event, if it was not accepted from this record.
    pub(super) fn not_here(&self, topic: Topic, arrival: &Arrival) -> Option<String> {
        let event = arrival.event.as_ref().ok().filter(|event| event.topic() == topic)?;
        let here = self
            .here
            .get(&arrival.offset)
            .is_some_and(|rows| rows.iter().any(|row| is_of(topic, row, event)));
        (!here).then(|| key(event))
    }

    pub(super) fn judge(
        &mut self,
        at: TopicPartition,
        arrival: &Arrival,
        found: &mut DeepFindings,
    ) {
        let place = format!("{at}@{}", arrival.offset);
        let reject = self.rejects.remove(&arrival.offset);
        let mut here = self.here.remove(&arrival.offset).unwrap_or_default();
        match &arrival.event {
            Ok(event) => {
                let own = here
                    .iter()
                    .position(|row| is_of(at.topic, row, event))
                    .map(|own| here.swap_remove(own));
                match own {
                    Some(row) => {
                        accepted_here(at.topic, &place, &row, event, reject.as_ref(), found)
                    }
                    None => self.accepted_elsewhere(&place, event, reject.as_ref(), found),
                }
            }
            Err(refusal) => refused(&place, refusal, reject.as_ref(), found),
        }
        if let Some(reject) = &reject {
            let columns = reject.differs_from(arrival);
            if !columns.is_empty() {
                found.differs(
                    "reject_changed",
                    format!("reject {}", reject.id),
                    format!("{}: differs from the record at {place}", columns.join(", ")),
                );
            }
        }
        for row in here {
            found.differs(
                "event_without_record",
                row.id(at.topic),
                format!("the record at {place} contains another event"),
            );
        }
    }

    /// Judges a record whose event was accepted from another record: a duplicate, or a conflict
    /// that is kept.
    fn accepted_elsewhere(
        &self,
        place: &str,
        event: &Event,
        reject: Option<&KeptReject>,
        found: &mut DeepFindings,
    ) {
        let row = self.elsewhere.get(&(event.deployment, key(event)));
        let conflict = reject.is_some_and(|reject| reject.disposition == Disposition::Conflict);
        match row {
            // rejected or held at the first reading: a later version, or a restored ledger, may
            // accept it
            _ if reject.is_some() && !conflict => {}
            None => found.differs(
                "event_missing",
                event.id(),
                format!("the ledger has neither an event nor a reject for the record at {place}"),
            ),
            Some(row) if row.digest == event.digest() && conflict => {
                found.differs(
                    "conflict_with_the_same",
                    event.id(),
                    format!(
                        "the record at {place} is kept as a conflict, but has the same content"
                    ),
                );
            }
            Some(row)
                if row.digest != event.digest()
                    && !conflict
                    && !self.corrected.contains(&(
                        event.deployment,
                        event.id(),
                        event.digest(),
                    )) =>
            {
                found.differs(
                    "conflict_missing",
                    event.id(),
                    format!("the record at {place} has other content, and the ledger has no reject for it"),
                );
            }
            Some(_) => {}
        }
    }

    /// Reports rows without a record, unless retention removed the record.
    pub(super) fn left_over(self, at: TopicPartition, start: i64, found: &mut DeepFindings) {
        for (offset, rows) in self.here.into_iter().filter(|(offset, _)| *offset >= start) {
            for row in rows {
                found.differs(
                    "event_without_record",
                    row.id(at.topic),
                    format!("the log holds no record at {at}@{offset}"),
                );
            }
        }
        for (offset, reject) in self.rejects.into_iter().filter(|(offset, _)| *offset >= start) {
            found.differs(
                "reject_without_record",
                format!("reject {}", reject.id),
                format!("the log holds no record at {at}@{offset}"),
            );
        }
    }
}

/// Compares every column of a row with the record from which it was accepted.
fn accepted_here(
    topic: Topic,
    place: &str,
    row: &KeptEvent,
    event: &Event,
    reject: Option<&KeptReject>,
    found: &mut DeepFindings,
) {
    let mut columns = match &row.event {
        Ok(kept) => differing(kept, event),
        Err(why) => vec![format!("not a valid event any more ({why})")],
    };
    if row.digest != event.digest() {
        columns.push("digest".to_owned());
    }
    if !columns.is_empty() {
        found.differs(
            "event_changed",
            row.id(topic),
            format!("{}: differs from the record at {place}", columns.join(", ")),
        );
    }
    let Some(reject) = reject else { return };
    let (id, detail) = (
        format!("reject {}", reject.id),
        format!("the record at {place} is accepted as {}", row.id(topic)),
    );
    // a replay reads a record a second time, and perhaps only one reading accepts it; a conflict
    // remains one
    let read_twice = reject.by_a_replay
        || row.batch.as_ref().is_some_and(|batch| batch.kind == BatchKind::Replay);
    if !read_twice || reject.disposition == Disposition::Conflict {
        found.differs("reject_of_an_event", id, detail);
    } else if reject.state == RejectState::Open {
        let detail = format!(
            "{detail} by another reading; `tallyline rejects resubmit {}` ends the reject and appends nothing",
            reject.id
        );
        found.joint.open.push(Difference { kind: "accepted_after_all".into(), id, detail });
    }
}

/// Judges a record that is not a valid event.
fn refused(place: &str, refusal: &Refusal, reject: Option<&KeptReject>, found: &mut DeepFindings) {
    let Some(reject) = reject else {
        return found.differs(
            "reject_missing",
            place,
            format!(
                "the record is not a valid event ({}), and the ledger has no reject for it",
                refusal.detail
            ),
        );
    };
    // signatures are not verified here
    if reject.cause.may_be_forged() {
        return;
    }
    let expected = if refusal.disposition == Disposition::Held {
        Disposition::Held
    } else {
        Disposition::Rejected
    };
    // each version judges held records again
    if reject.disposition != Disposition::Held && reject.disposition != expected {
        let detail = format!(
            "disposition: the reject has {}, the record at {place} gives {expected}",
            reject.disposition
        );
        found.differs("reject_changed", format!("reject {}", reject.id), detail);
    } else if reject.disposition == expected && reject.cause != refusal.cause {
        let detail = format!(
            "cause: the reject has {}, this version gives {}; another version may have set it",
            reject.cause, refusal.cause
        );
        found.joint.remarks.push(Difference {
            kind: "reject_cause".into(),
            id: format!("reject {}", reject.id),
            detail,
        });
    }
}

fn key(event: &Event) -> String {
    match &event.payload {
        event::Payload::Build(build) => build.build_id.to_string(),
        event::Payload::Claim(claim) => claim.build_id.to_string(),
        event::Payload::Usage(usage) => usage.id.clone(),
    }
}

fn is_of(topic: Topic, row: &KeptEvent, event: &Event) -> bool {
    // a row without a readable event is compared by its key
    event.topic() == topic
        && row.key == key(event)
        && row.event.as_ref().map_or(true, |kept| kept.deployment == event.deployment)
}

/// The column of a field of the wire form, if the names differ.
fn column(field: &str) -> &str {
    match field {
        "count" | "runtime_ms" => "quantity",
        "type" => "event_type",
        "time" => "created_at",
        "publishstartedat" => "publish_started_at",
        "publishedat" => "published_at",
        "failuremessage" => "failure_message",
        other => other,
    }
}

fn differing(kept: &Event, record: &Event) -> Vec<String> {
    if kept == record {
        return Vec::new();
    }
    let (kept, record) = (fields(kept), fields(record));
    let names: std::collections::BTreeSet<&String> = kept.keys().chain(record.keys()).collect();
    names.into_iter().filter(|name| kept.get(*name) != record.get(*name)).cloned().collect()
}

fn fields(event: &Event) -> BTreeMap<String, Value> {
    let mut fields = BTreeMap::new();
    if let Value::Object(attributes) = event.to_structured() {
        for (name, value) in attributes {
            match (name.as_str(), value) {
                ("data", Value::Object(data)) => fields.extend(
                    data.into_iter().map(|(name, value)| (column(&name).to_owned(), value)),
                ),
                // it repeats a field of the data under another name
                ("time", _) if !matches!(event.payload, event::Payload::Usage(_)) => {}
                (name, value) => {
                    fields.insert(column(name).to_owned(), value);
                }
            }
        }
    }
    fields
}
