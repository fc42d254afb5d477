//! The ranges of time whose builds are known, with marks by which coderd's database shows whether a
//! range has changed.

use chrono::{DateTime, TimeDelta, Utc};

use super::bounds::before;
use crate::coderd::RangeMark;

/// Rows dated later than this before a pass are not marked: more of them are being committed.
const OPEN: TimeDelta = TimeDelta::seconds(2);
/// Ranges that end this long before the last one are compared in each pass: rows are seldom
/// committed later than this.
const RECENT: TimeDelta = TimeDelta::seconds(10);
/// Marked ranges are joined up to this length.
const LENGTH: TimeDelta = TimeDelta::minutes(1);

/// The completed builds of `[since, until)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) since: DateTime<Utc>,
    pub(super) until: DateTime<Utc>,
    /// The mark when all of them were known. None: some are not.
    pub(super) mark: Option<RangeMark>,
}

/// Ranges without gaps, in order. About one for each minute of the overlap.
#[derive(Debug, Default)]
pub(super) struct Ranges(Vec<Range>);

/// What a pass has to find in the ranges.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    /// Where the pass begins.
    pub(super) from: DateTime<Utc>,
    /// Where ranges begin: earlier builds are read without a mark.
    pub(super) floor: DateTime<Utc>,
    /// The pass must know all builds from `from` until here. None: all until now.
    pub(super) complete_until: Option<DateTime<Utc>>,
    pub(super) now: DateTime<Utc>,
}

impl Ranges {
    /// Takes the ranges that a pass compares with coderd's database. The others need no look: their
    /// builds are not reported complete yet, or were before.
    pub(super) fn due(&mut self, reach: Reach) -> Vec<Range> {
        self.cover(reach);
        let recent = self.0.last().map_or(reach.now, |last| before(last.until, RECENT));
        let is_due = |range: &Range| {
            range.until > reach.from
                && (range.mark.is_none()
                    || range.until > recent
                    || reach.complete_until.is_none_or(|until| range.since < until))
        };
        self.0.iter().filter(|range| is_due(range)).copied().collect()
    }

    /// Where the builds begin that belong to no range.
    pub(super) fn end(&self) -> Option<DateTime<Utc>> {
        self.0.last().map(|last| last.until)
    }

    /// Sets the mark of the range that begins at `since`.
    pub(super) fn set(&mut self, since: DateTime<Utc>, mark: Option<RangeMark>) {
        if let Ok(at) = self.0.binary_search_by_key(&since, |range| range.since) {
            self.0[at].mark = mark;
        }
    }

    /// Joins short ranges that end before `until`.
    pub(super) fn join(&mut self, until: DateTime<Utc>) {
        let mut joined: Vec<Range> = Vec::with_capacity(self.0.len());
        for range in self.0.drain(..) {
            if let Some(last) = joined.last_mut()
                && range.until <= until
                && range.until.signed_duration_since(last.since) <= LENGTH
                && let (Some(earlier), Some(later)) = (last.mark, range.mark)
            {
                (last.until, last.mark) = (range.until, Some(earlier.plus(later)));
            } else {
                joined.push(range);
            }
        }
        self.0 = joined;
    }

    /// Adds ranges, so that they reach from the begin of the pass until shortly before now.
    fn cover(&mut self, reach: Reach) {
        let end = before(reach.now, OPEN);
        self.0.retain(|range| range.until > reach.floor && range.until <= end);
        let from = reach.from.max(reach.floor);
        if let Some(first) = self.0.first().map(|first| first.since) {
            self.0.splice(0..0, unknown(from, first));
        }
        self.0.extend(unknown(self.end().unwrap_or(from), end));
    }
}

/// Unknown ranges from `since` until `until`.
fn unknown(mut since: DateTime<Utc>, until: DateTime<Utc>) -> Vec<Range> {
    let mut ranges = Vec::new();
    while since < until {
        let next = since.checked_add_signed(LENGTH).map_or(until, |next| next.min(until));
        ranges.push(Range { since, until: next, mark: None });
        since = next;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    fn mark(jobs: i64) -> Option<RangeMark> {
        Some(RangeMark { jobs, ids: jobs })
    }

    fn reach(from: i64, complete_until: i64, now: i64) -> Reach {
        let (from, now) = (at(from), at(now));
        Reach { from, floor: at(0), complete_until: Some(at(complete_until)), now }
    }

    /// Passes with a margin of 60 seconds, each 5 seconds, that find every range marked.
    fn after_passes() -> Ranges {
        let mut ranges = Ranges::default();
        for now in (1000..1300).step_by(5) {
            for range in ranges.due(reach(now - 65, now - 60, now)) {
                ranges.set(range.since, mark(1));
            }
            ranges.join(at(now - 60));
        }
        ranges
    }

    fn spans(ranges: &[Range]) -> Vec<(i64, i64)> {
        ranges.iter().map(|one| (one.since.timestamp(), one.until.timestamp())).collect()
    }

    #[test]
    fn a_pass_compares_what_it_reports_complete_and_what_is_recent() {
        let mut ranges = after_passes();
        let due = spans(&ranges.due(reach(1235, 1240, 1300)));
        assert!(due.iter().any(|(since, until)| *since <= 1235 && 1235 < *until), "{due:?}");
        assert!(due.contains(&(1293, 1298)) && due.contains(&(1288, 1293)), "{due:?}");
        assert!(!due.iter().any(|(since, _)| (1245..1280).contains(since)), "{due:?}");
    }

    #[test]
    fn a_pass_that_reaches_back_compares_every_range_from_there() {
        let mut ranges = after_passes();
        let due = ranges.due(Reach { complete_until: None, ..reach(900, 0, 1300) });
        let times = spans(&due);
        assert_eq!((times[0].0, times[times.len() - 1].1), (900, 1298));
        assert!(times.windows(2).all(|pair| pair[0].1 == pair[1].0), "no gap: {times:?}");
        let unmarked: Vec<Range> = due.into_iter().filter(|range| range.mark.is_none()).collect();
        // the newest range is new, too
        assert_eq!(spans(&unmarked), [(900, 935), (1293, 1298)]);
    }

    #[test]
    fn an_unknown_range_is_compared_until_it_is_known() {
        let mut ranges = after_passes();
        let middle = ranges.0[ranges.0.len() - 6].since;
        ranges.set(middle, None);
        let due = ranges.due(reach(1235, 1240, 1300));
        assert!(due.iter().any(|range| range.since == middle));
        ranges.join(at(1300));
        assert!(ranges.0.iter().any(|range| range.since == middle && range.mark.is_none()));
    }

    #[test]
    fn joined_ranges_keep_their_builds_and_forgotten_ones_leave_no_gap() {
        let mut ranges = after_passes();
        let all: i64 = ranges.0.iter().filter_map(|range| range.mark).map(|mark| mark.jobs).sum();
        ranges.join(at(1300));
        let joined: i64 =
            ranges.0.iter().filter_map(|range| range.mark).map(|mark| mark.jobs).sum();
        assert_eq!(all, joined);
        assert!(ranges.0.len() < 10, "{}", ranges.0.len());
        let due =
            ranges.due(Reach { floor: at(1100), complete_until: None, ..reach(900, 0, 1300) });
        assert!(due[0].since <= at(1100) && due[0].until > at(1100), "{due:?}");
    }

    #[test]
    fn ranges_after_now_are_forgotten() {
        let mut ranges = after_passes();
        ranges.due(reach(1100, 1110, 1200));
        assert_eq!(ranges.end(), Some(at(1198)));
    }
}
