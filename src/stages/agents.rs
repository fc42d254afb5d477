//! Managed agents by the instant of their start, countable over any window.

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// Maximum entries of a run. A new entry moves at most this number. A count sums two runs and the
/// totals of the others, which are about as many with a million events.
const RUN: usize = 1024;

/// Number of agents started at each microsecond. Any order of the events gives the same value. In
/// JSON it is the ordered list of `[microseconds since the Unix epoch, count]`.
///
/// The state consists of ordered runs with their totals. A count over any window reads two runs and
/// the totals between them. It takes some microseconds with a million events, for any distribution
/// over time.
#[derive(Clone, Debug, Default)]
pub struct AgentCounts {
    runs: Vec<Run>,
}

/// A non-empty, ordered run.
#[derive(Clone, Debug)]
struct Run {
    entries: Vec<(i64, u64)>,
    total: u128,
}

impl Run {
    fn of(entries: Vec<(i64, u64)>) -> Self {
        Self { total: sum(&entries), entries }
    }

    fn last(&self) -> Option<&(i64, u64)> {
        self.entries.last()
    }

    /// The index of the first entry at or after `micros`.
    fn from(&self, micros: i64) -> usize {
        self.entries.partition_point(|(at, _)| *at < micros)
    }
}

fn sum(entries: &[(i64, u64)]) -> u128 {
    entries.iter().map(|(_, count)| u128::from(*count)).sum()
}

impl AgentCounts {
    /// Adds `count` agents at an instant, rounded down to the microsecond.
    pub fn add(&mut self, at: DateTime<Utc>, count: u64) {
        self.insert((at.timestamp_micros(), count));
    }

    /// Removes what [`AgentCounts::add`] added. False: it was not added, and nothing changes. Moves
    /// at most a run of entries.
    #[must_use]
    pub fn remove(&mut self, at: DateTime<Utc>, count: u64) -> bool {
        let entry = (at.timestamp_micros(), count);
        let index = self.runs.partition_point(|run| run.last() < Some(&entry));
        let Some(run) = self.runs.get_mut(index) else { return false };
        let Ok(place) = run.entries.binary_search(&entry) else { return false };
        run.entries.remove(place);
        run.total -= u128::from(count);
        if run.entries.is_empty() {
            self.runs.remove(index);
        }
        true
    }

    /// Number of agents started in the half-open window: `start` included, `end` not. Exact for any
    /// number of events.
    #[must_use]
    pub fn count(&self, start: DateTime<Utc>, end: DateTime<Utc>) -> u128 {
        self.between(micros_at_or_after(start), micros_at_or_after(end))
    }

    /// The count of coderd's own rollup for this window: whole UTC days, including the days of both
    /// ends.
    #[must_use]
    pub fn count_whole_days(&self, start: DateTime<Utc>, end: DateTime<Utc>) -> u128 {
        let after = end.date_naive().succ_opt().map_or(i64::MAX, midnight);
        self.between(midnight(start.date_naive()), after)
    }

    #[must_use]
    pub fn events(&self) -> usize {
        self.runs.iter().map(|run| run.entries.len()).sum()
    }

    fn between(&self, start: i64, end: i64) -> u128 {
        if start >= end {
            return 0;
        }
        let first = self.run_with(start);
        let last = self.run_with(end);
        if first == last {
            return self
                .runs
                .get(first)
                .map_or(0, |run| sum(&run.entries[run.from(start)..run.from(end)]));
        }
        let head = self.runs.get(first).map_or(0, |run| sum(&run.entries[run.from(start)..]));
        let middle: u128 = self.runs[first + 1..last].iter().map(|run| run.total).sum();
        let tail = self.runs.get(last).map_or(0, |run| sum(&run.entries[..run.from(end)]));
        head + middle + tail
    }

    /// The index of the first run that ends at `micros` or later; the number of runs if none does.
    fn run_with(&self, micros: i64) -> usize {
        self.runs.partition_point(|run| run.last().is_some_and(|(at, _)| *at < micros))
    }

    fn insert(&mut self, entry: (i64, u64)) {
        let first_reaching = self.runs.partition_point(|run| run.last() < Some(&entry));
        let index = first_reaching.min(self.runs.len().saturating_sub(1));
        let Some(run) = self.runs.get_mut(index) else {
            self.runs.push(Run::of(vec![entry]));
            return;
        };
        let place = run.entries.partition_point(|other| *other <= entry);
        if run.entries.len() < RUN {
            run.entries.insert(place, entry);
            run.total += u128::from(entry.1);
        } else if place == RUN {
            // After a full run: events in the order of time fill each run before the next one
            // begins.
            self.runs.insert(index + 1, Run::of(vec![entry]));
        } else {
            let upper = run.entries.split_off(RUN / 2);
            run.total = sum(&run.entries);
            self.runs.insert(index + 1, Run::of(upper));
            self.insert(entry);
        }
    }

    fn entries(&self) -> impl Iterator<Item = &(i64, u64)> {
        self.runs.iter().flat_map(|run| &run.entries)
    }
}

/// The first whole microsecond that is not before `at`.
fn micros_at_or_after(at: DateTime<Utc>) -> i64 {
    at.timestamp_micros() + i64::from(!at.timestamp_subsec_nanos().is_multiple_of(1000))
}

fn midnight(day: NaiveDate) -> i64 {
    day.and_time(NaiveTime::MIN).and_utc().timestamp_micros()
}

/// The division into runs depends on the order of arrival, and is not part of the value.
impl PartialEq for AgentCounts {
    fn eq(&self, other: &Self) -> bool {
        self.entries().eq(other.entries())
    }
}

impl Eq for AgentCounts {}

impl Serialize for AgentCounts {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.entries())
    }
}

impl<'de> Deserialize<'de> for AgentCounts {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let entries = Vec::<(i64, u64)>::deserialize(from)?;
        if !entries.is_sorted() {
            return Err(D::Error::custom("agent counts are not ordered by time"));
        }
        Ok(Self { runs: entries.chunks(RUN).map(|run| Run::of(run.to_vec())).collect() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(micros: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(micros).unwrap()
    }

    fn counts(entries: &[(i64, u64)]) -> AgentCounts {
        let mut counts = AgentCounts::default();
        for (micros, count) in entries {
            counts.add(at(*micros), *count);
        }
        counts
    }

    fn day(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn a_window_includes_its_start_and_not_its_end_to_the_microsecond() {
        let counts = counts(&[(9, 1), (10, 2), (10, 4), (11, 8), (20, 16)]);
        assert_eq!(counts.count(at(10), at(20)), 14);
        assert_eq!(counts.count(at(10), at(21)), 30);
        assert_eq!(counts.count(at(11), at(11)), 0);
        assert_eq!(counts.count(at(20), at(10)), 0, "a window that ends before it starts is empty");
        // Ends finer than a microsecond: an event at 10 is before 10.5. It is not in the window
        // from 10.5, but in the window to 10.5.
        let finer = at(10) + chrono::TimeDelta::nanoseconds(500);
        assert_eq!((counts.count(finer, at(100)), counts.count(at(0), finer)), (24, 7));
    }

    #[test]
    fn whole_days_take_both_ends_days_in() {
        let mut counts = AgentCounts::default();
        for (text, count) in [
            ("2025-06-30T23:59:59.999999Z", 1),
            ("2025-07-01T00:00:00Z", 2),
            ("2025-07-01T11:59:59.999999Z", 4),
            ("2025-07-03T12:00:00Z", 8),
            ("2025-07-03T23:59:59.999999Z", 16),
            ("2025-07-04T00:00:00Z", 32),
        ] {
            counts.add(day(text), count);
        }
        let (start, end) = (day("2025-07-01T12:00:00Z"), day("2025-07-03T12:00:00Z"));
        assert_eq!(counts.count(start, end), 0);
        assert_eq!(counts.count_whole_days(start, end), 30);
        assert_eq!(counts.count_whole_days(DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC), 63);
    }

    #[test]
    fn a_count_does_not_overflow() {
        let counts = counts(&[(1, u64::MAX), (2, u64::MAX)]);
        assert_eq!(counts.count(at(0), at(3)), 2 * u128::from(u64::MAX));
    }

    #[test]
    fn counts_out_of_order_are_refused() {
        assert!(serde_json::from_str::<AgentCounts>("[[2,1],[1,1]]").is_err());
    }

    #[test]
    fn a_count_of_a_million_events_reads_a_few_thousand_numbers() {
        // All within one day, so that totals of days cannot give any count; every third event is
        // late.
        let mut counts = AgentCounts::default();
        for i in 0..1_000_000_i64 {
            counts.add(at(if i % 3 == 0 { i * 7 } else { i * 80_000 }), 1);
        }
        assert_eq!(counts.events(), 1_000_000);
        // a count reads two runs and the totals of the others
        assert!(counts.runs.iter().all(|run| (1..=RUN).contains(&run.entries.len())));
        assert!(counts.runs.len() <= 2 * 1_000_000 / RUN + 1, "{} runs", counts.runs.len());
    }

    fn events() -> impl Strategy<Value = Vec<(i64, u64)>> {
        prop::collection::vec((0..3000_i64, 1..5_u64), 0..2500)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_count_equals_counting_one_by_one(events in events(), start in -10..3100_i64, end in -10..3100_i64) {
            let expected: u64 = events.iter().filter(|(micros, _)| (start..end).contains(micros)).map(|(_, count)| count).sum();
            prop_assert_eq!(counts(&events).count(at(start), at(end)), u128::from(expected));
        }

        #[test]
        fn any_order_gives_an_equal_value_and_an_equal_snapshot((one, other) in events().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))) {
            let (one, other) = (counts(&one), counts(&other));
            prop_assert_eq!(serde_json::to_string(&one).unwrap(), serde_json::to_string(&other).unwrap());
            prop_assert_eq!(one, other);
        }

        #[test]
        fn removed_events_leave_the_value_of_the_others(kept in events(), removed in events()) {
            let mut all = counts(&[kept.clone(), removed.clone()].concat());
            for (micros, count) in &removed {
                prop_assert!(all.remove(at(*micros), *count));
            }
            prop_assert!(all.runs.iter().all(|run| !run.entries.is_empty() && run.total == sum(&run.entries)));
            prop_assert_eq!(&all, &counts(&kept));
            prop_assert!(!all.remove(at(3001), 1), "it was never added");
            prop_assert_eq!(all, counts(&kept));
        }

        #[test]
        fn a_restored_value_continues_as_if_never_saved(before in events(), after in events()) {
            let mut restored: AgentCounts = serde_json::from_str(&serde_json::to_string(&counts(&before)).unwrap()).unwrap();
            for (micros, count) in &after {
                restored.add(at(*micros), *count);
            }
            prop_assert_eq!(restored, counts(&[before, after].concat()));
        }
    }
}
