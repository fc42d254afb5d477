//! Rereads every record in the log and compares it with its row, and every row with its own digest.
//! It names each event that was changed, removed or added by hand.

use super::deep_findings::DeepFindings;
use super::deep_records::PageRows;
use super::joint::{Audit, Joint};
use crate::event::{self, ParseError, Topic};
use crate::ledger::{
    Arrival, Disposition, KeptEvent, KeptRange, Refusal, RowReading, corrected, kept, row_checks,
};
use crate::log::{LogError, Record};

/// Records, and rows, in one comparison: this bounds memory.
const PAGE: usize = 2_000;

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
        let ledger = self.ledger.with_statements(row_checks::STATEMENTS);
        let mut reading = RowReading::default();
        while let Some(differences) = ledger.run(async |conn| reading.read(conn).await).await? {
            differences.into_iter().for_each(|difference| found.push(difference));
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
