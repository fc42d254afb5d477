//! Rereads every record in the log and compares it with its row, and every row with its own digest.
//! It names each event that was changed, removed or added by hand.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;
use uuid::Uuid;

use super::joint::{Audit, Joint};
use crate::event::{self, Digest, Event, ParseError, Topic, TopicPartition};
use crate::ledger::{
    Arrival, BatchKind, Difference, Disposition, KeptEvent, KeptRange, KeptReject, Refusal,
    RejectState, corrected, kept,
};
use crate::log::{LogError, Record};

/// Records, and rows, in one comparison: this bounds memory.
const PAGE: usize = 2_000;

/// The most differences in the list; their number covers all.
const LISTED: usize = 1_000;

const DEEP: &str = "log and ledger, record by record";

impl Audit {
    /// The ranges that the ledger has read and the log still has.
    pub async fn rereadable(&self) -> anyhow::Result<Vec<KeptRange>> {
        let mut ranges = self.ledger.run(kept::ranges).await?;
        for range in &mut ranges {
            let (start, end) = self.log.watermarks(range.partition).await?;
            // a topic that was lost and not yet recovered has none of the range; the other joints
            // report that
            (range.from, range.until) = (range.from.max(start), range.until.min(end));
        }
        ranges.retain(|range| range.from < range.until);
        Ok(ranges)
    }

    /// Rereads these ranges and compares each record with the ledger. Then compares each row of the
    /// ledger with its digest and related rows. Calls `progress` with the number of offsets of each
    /// finished page.
    pub async fn deep(
        &self,
        ranges: &[KeptRange],
        progress: impl Fn(u64),
    ) -> anyhow::Result<Joint> {
        let mut found = DeepFindings { joint: Joint::new(DEEP), differences: 0 };
        let mut read = 0;
        for range in ranges {
            let mut rest = *range;
            while let Some((page, records)) = self.page(&mut rest).await? {
                read += records.len();
                self.compare(&page, records, &mut found).await?;
                progress(u64::try_from(page.until - page.from).unwrap_or_default());
            }
        }
        found.joint.number("records_read_again", read);
        for (topic, name) in [
            (Topic::WorkspaceBuilds, "builds_checked_by_their_digests"),
            (Topic::PrebuildClaims, "claims_checked_by_their_digests"),
            (Topic::AgentUsage, "usage_checked_by_its_digests"),
        ] {
            let rows = self.rows(topic, &mut found).await?;
            found.joint.number(name, rows);
        }
        let listed = i64::try_from(LISTED)?;
        let ledger = self.ledger.with_statements(kept::STATEMENTS);
        for difference in ledger.run(async |conn| kept::differences(conn, listed).await).await? {
            found.push(difference);
        }
        found.joint.number("differences", found.differences);
        Ok(found.joint)
    }

    /// The next records of the range and their offsets; None at its end. Leaves out records that
    /// retention removes in between.
    async fn page(&self, rest: &mut KeptRange) -> anyhow::Result<Option<(KeptRange, Vec<Record>)>> {
        if rest.from >= rest.until {
            return Ok(None);
        }
        let mut records = match self.log.read(rest.partition, rest.from, PAGE).await {
            Ok(records) => records,
            Err(LogError::OutOfRange { start, .. }) if start > rest.from => {
                rest.from = start;
                return Ok(Some((KeptRange { until: start, ..*rest }, Vec::new())));
            }
            Err(error) => return Err(error.into()),
        };
        let full = records.len() == PAGE;
        records.retain(|record| record.offset < rest.until);
        let until = match records.last() {
            Some(last) if full => last.offset + 1,
            _ => rest.until,
        };
        let page = KeptRange { until, ..*rest };
        rest.from = until;
        Ok(Some((page, records)))
    }

    async fn compare(
        &self,
        page: &KeptRange,
        records: Vec<Record>,
        found: &mut DeepFindings,
    ) -> anyhow::Result<()> {
        if page.from >= page.until {
            return Ok(());
        }
        let arrivals: Vec<Arrival> =
            records.into_iter().map(|record| arrival(page.partition.topic, record)).collect();
        let mut kept = PageRows::default();
        for row in self.ledger.run(async |conn| kept::events_in(conn, page).await).await? {
            kept.here.entry(row.log_offset).or_default().push(row);
        }
        for reject in self.ledger.run(async |conn| kept::rejects_in(conn, page).await).await? {
            kept.rejects.insert(reject.log_offset, reject);
        }
        let topic = page.partition.topic;
        let elsewhere: Vec<String> =
            arrivals.iter().filter_map(|arrival| kept.not_here(topic, arrival)).collect();
        for row in
            self.ledger.run(async |conn| kept::events_by_key(conn, topic, &elsewhere).await).await?
        {
            if let Some(deployment) = row.event.as_ref().ok().map(|event| event.deployment) {
                kept.elsewhere.insert((deployment, row.key.clone()), row);
            }
        }
        let ids: Vec<String> = arrivals
            .iter()
            .filter(|arrival| kept.not_here(topic, arrival).is_some())
            .filter_map(|arrival| Some(arrival.event.as_ref().ok()?.id()))
            .collect();
        kept.corrected =
            self.ledger.run(async |conn| corrected::contents(conn, &ids).await).await?;
        for arrival in &arrivals {
            kept.judge(page.partition, arrival, found);
        }
        // retention may have removed the oldest records since
        let (start, _) = self.log.watermarks(page.partition).await?;
        kept.left_over(page.partition, start, found);
        Ok(())
    }

    /// Compares every row of a topic's table with its digest and its batch. Returns their number.
    async fn rows(&self, topic: Topic, found: &mut DeepFindings) -> anyhow::Result<usize> {
        let (mut after, mut count) = (None, 0);
        loop {
            let page = i64::try_from(PAGE)?;
            let rows = self
                .ledger
                .run(async |conn| kept::events_after(conn, topic, after, page).await)
                .await?;
            let Some(last) = rows.last() else { return Ok(count) };
            after = Some((last.source_id, last.key.clone()));
            count += rows.len();
            for row in &rows {
                row_alone(topic, row, found);
            }
        }
    }
}

/// Differences until now.
pub(super) struct DeepFindings {
    pub(super) joint: Joint,
    pub(super) differences: usize,
}

impl DeepFindings {
    fn push(&mut self, difference: Difference) {
        self.differences += 1;
        if self.joint.differences.len() < LISTED {
            self.joint.differences.push(difference);
        }
    }

    pub(super) fn differs(
        &mut self,
        kind: &'static str,
        id: impl Into<String>,
        detail: impl Into<String>,
    ) {
        self.push(Difference { kind: kind.into(), id: id.into(), detail: detail.into() });
    }
}

/// The ledger's rows of a page of records.
#[derive(Default)]
struct PageRows {
    /// Events accepted from the page, by offset: more than one only after a change by hand.
    here: BTreeMap<i64, Vec<KeptEvent>>,
    /// Events with ids of the page that were accepted from another record.
    elsewhere: HashMap<(Uuid, String), KeptEvent>,
    /// Contents of these events before and after corrections. A record with one is a duplicate.
    corrected: HashSet<(Uuid, String, Digest)>,
    rejects: BTreeMap<i64, KeptReject>,
}

impl PageRows {
    /// The key of the record's event, if it was not accepted from this record.
    fn not_here(&self, topic: Topic, arrival: &Arrival) -> Option<String> {
        let event = arrival.event.as_ref().ok().filter(|event| event.topic() == topic)?;
        let here = self
            .here
            .get(&arrival.offset)
            .is_some_and(|rows| rows.iter().any(|row| is_of(topic, row, event)));
        (!here).then(|| key(event))
    }

    fn judge(&mut self, at: TopicPartition, arrival: &Arrival, found: &mut DeepFindings) {
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
    fn left_over(self, at: TopicPartition, start: i64, found: &mut DeepFindings) {
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

/// Checks a row by itself: its digest matches its columns, and its batch is from the log and covers
/// its record.
fn row_alone(topic: Topic, row: &KeptEvent, found: &mut DeepFindings) {
    match &row.event {
        Ok(event) if event.digest().as_slice() == row.digest => {}
        Ok(_) => found.differs(
            "digest_differs",
            row.id(topic),
            "its columns do not match the digest under which it was accepted",
        ),
        Err(why) => found.differs("event_unreadable", row.id(topic), why),
    }
    let Some(batch) = &row.batch else {
        return found.differs(
            "event_without_its_batch",
            row.id(topic),
            format!("it names batch {}, which does not exist", row.batch_id),
        );
    };
    let of_the_topic = batch.topic.as_deref() == Some(topic.name());
    let inside = batch.first_offset.is_some_and(|first| first <= row.log_offset)
        && batch.next_offset.is_some_and(|next| row.log_offset < next);
    if !of_the_topic || !inside {
        let detail =
            format!("offset {} of {topic} is not in batch {}", row.log_offset, row.batch_id);
        found.differs("event_outside_its_batch", row.id(topic), detail);
    }
}

/// Parses a record as a consumer of that topic does.
fn arrival(topic: Topic, record: Record) -> Arrival {
    let refusal = |error: ParseError| {
        let cause = error.cause();
        Refusal { disposition: Disposition::of(cause), cause, detail: error.to_string() }
    };
    let event = event::parse_in(topic, &record.message).map_err(refusal);
    Arrival {
        offset: record.offset,
        timestamp: record.timestamp,
        message: record.message,
        event,
        confirmed: false,
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
