//! Collects the builds that can be new. It reads only those of ranges of time that have changed.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::bounds::{Bounds, WIDE_INTERVAL, before};
use super::open::Collector;
use super::ranges::{Range, Reach};
use super::report::PassTotals;
use super::settings::CollectError;
use super::take::full;
use crate::coderd::{BuildKey, Catalog, RangeMark, Reader, Time};

/// Pages of rows in one read of keys by time. Each read begins with every worker, so a larger read
/// costs coderd less.
const KEY_PAGES: i64 = 20;
/// Ranges in one read of keys: a page of keys sorts all of them.
const RANGES: usize = 5;

impl Collector {
    /// Collects the builds since `from` that this process does not know. The marks are read before
    /// the builds: a build that comes in between changes the next mark.
    pub(super) async fn recent_builds(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        (from, bounds): (DateTime<Utc>, &Bounds),
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        // after a long pause the earlier builds need no marks: no later pass reads them
        let floor = self
            .wide_reach(bounds.now)
            .max(before(before(bounds.now, self.settings.overlap), WIDE_INTERVAL));
        let reach = Reach {
            from,
            floor,
            complete_until: bounds.complete_until.filter(|_| !bounds.overlaps && !bounds.is_wide),
            now: bounds.now,
        };
        let due = self.ranges.due(reach);
        if from < floor {
            self.take_between(reader, catalog, (from.into(), floor.into()), totals).await?;
        }
        let spans: Vec<(Time, Time)> =
            due.iter().map(|range| (range.since.into(), range.until.into())).collect();
        let marks = if spans.is_empty() { Vec::new() } else { reader.range_marks(&spans).await? };
        let changed: Vec<(Range, RangeMark)> =
            due.into_iter().zip(marks).filter(|(range, mark)| range.mark != Some(*mark)).collect();
        let end = self.ranges.end().unwrap_or(from);
        let mut begin_of_rest = end;
        for run in changed.chunk_by(|(one, _), (next, _)| one.until == next.since) {
            for run in run.chunks(RANGES) {
                let (Some((first, _)), Some((last, _))) = (run.first(), run.last()) else {
                    continue;
                };
                let (since, until) = (first.since, last.until);
                if until == end {
                    begin_of_rest = since;
                }
                let until = if until == end { Time::INFINITY } else { until.into() };
                let all_known =
                    self.take_between(reader, catalog, (since.into(), until), totals).await?;
                for (range, mark) in run {
                    self.ranges.set(range.since, all_known.then_some(*mark));
                }
            }
        }
        if begin_of_rest == end {
            self.take_between(reader, catalog, (end.into(), Time::INFINITY), totals).await?;
        }
        Ok(())
    }

    /// Collects the builds between these times, both included. Returns whether all are known now:
    /// the log or the ledger has them.
    async fn take_between(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        (since, until): (Time, Time),
        totals: &mut PassTotals,
    ) -> Result<bool, CollectError> {
        let page = self.settings.page;
        let page_of_keys = page.saturating_mul(KEY_PAGES);
        let (mut after, mut all_known) = ((since, Uuid::nil()), true);
        loop {
            self.lease.check()?;
            let keys = reader.build_keys_until(after, until, page_of_keys).await?;
            for keys in keys.chunks(usize::try_from(page).unwrap_or(usize::MAX)) {
                self.take_builds(reader, catalog, keys, totals).await?;
                all_known &= keys.iter().all(|key| self.knows(key));
            }
            match keys.last() {
                Some(last) if full(keys.len(), page_of_keys) => {
                    after = (last.completed_at, last.job_id);
                }
                _ => return Ok(all_known),
            }
        }
    }

    fn knows(&self, key: &BuildKey) -> bool {
        key.build_id.is_some_and(|id| self.builds.contains(&id))
    }
}
