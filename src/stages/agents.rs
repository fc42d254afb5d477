//! Managed agents by the instant of their start, countable over any window.

use std::sync::Arc;

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};

use super::agent_hour::{AgentHour, HOUR};

/// Hours of a block.
const BLOCK: i64 = 128;

/// Number of agents started at each microsecond. Any order of the events gives the same value.
///
/// Hours are grouped in blocks, and hours and blocks have totals. A count over any window adds the
/// totals of blocks (69 a year), of the hours of two blocks, and of two hours' entries. It takes
/// some microseconds at most with millions of events, for any distribution over time.
///
/// A clone shares the hours; a change copies a shared hour first.
#[derive(Clone, Debug, Default)]
pub struct AgentCounts {
    blocks: Totals<Totals<AgentHour>>,
}

/// Parts by number, in order, with the number of agents in each.
#[derive(Clone, Debug)]
struct Totals<T>(Vec<Total<T>>);

#[derive(Clone, Debug)]
struct Total<T> {
    number: i64,
    agents: u128,
    part: Arc<T>,
}

impl<T> Default for Totals<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Clone + Default> Totals<T> {
    fn place(&self, number: i64) -> Result<usize, usize> {
        match self.0.last() {
            Some(last) if last.number == number => Ok(self.0.len() - 1),
            _ => self.0.binary_search_by_key(&number, |total| total.number),
        }
    }

    fn get(&self, number: i64) -> Option<&T> {
        self.place(number).ok().map(|place| &*self.0[place].part)
    }

    /// The part of that number, to which `agents` are added.
    fn add(&mut self, number: i64, agents: u128) -> &mut T {
        let place = self.place(number).unwrap_or_else(|place| {
            self.0.insert(place, Total { number, agents: 0, part: Arc::default() });
            place
        });
        let total = &mut self.0[place];
        total.agents += agents;
        Arc::make_mut(&mut total.part)
    }

    /// Removes `agents` from the part of that number by `remove`, which returns whether the part is
    /// empty then. An empty part is removed.
    fn remove(&mut self, number: i64, agents: u128, remove: impl FnOnce(&mut T) -> bool) {
        let Ok(place) = self.place(number) else { return };
        let total = &mut self.0[place];
        total.agents -= agents;
        if remove(Arc::make_mut(&mut total.part)) {
            self.0.remove(place);
        }
    }

    /// Number of agents in the parts of a lower number.
    fn before(&self, number: i64) -> u128 {
        let place = self.place(number).unwrap_or_else(|place| place);
        self.0[..place].iter().map(|total| total.agents).sum()
    }

    fn iter(&self) -> impl Iterator<Item = (i64, &T)> {
        self.0.iter().map(|total| (total.number, &*total.part))
    }
}

impl AgentCounts {
    /// Adds `count` agents at an instant, rounded down to the microsecond. Returns the changed
    /// hour: hours since the Unix epoch.
    pub fn add(&mut self, at: DateTime<Utc>, count: u64) -> i64 {
        let micros = at.timestamp_micros();
        let (block, hour) = place_of(micros);
        let hours = self.blocks.add(block, u128::from(count));
        hours.add(hour, u128::from(count)).insert((micros, count));
        hour
    }

    /// Removes an addition by [`AgentCounts::add`]. Returns the changed hour; none: it was not
    /// added, and nothing changes.
    pub fn remove(&mut self, at: DateTime<Utc>, count: u64) -> Option<i64> {
        let micros = at.timestamp_micros();
        let ((block, hour), agents) = (place_of(micros), u128::from(count));
        let entries = self.blocks.get(block).and_then(|hours| hours.get(hour))?;
        if !entries.contains(&(micros, count)) {
            return None;
        }
        self.blocks.remove(block, agents, |hours| {
            hours.remove(hour, agents, |entries| {
                entries.remove(&(micros, count));
                entries.is_empty()
            });
            hours.0.is_empty()
        });
        Some(hour)
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
        self.entries().count()
    }

    fn between(&self, start: i64, end: i64) -> u128 {
        self.before(end).saturating_sub(self.before(start))
    }

    fn before(&self, micros: i64) -> u128 {
        let (block, hour) = place_of(micros);
        let hours = self.blocks.get(block);
        let entries = hours.and_then(|hours| hours.get(hour));
        self.blocks.before(block)
            + hours.map_or(0, |hours| hours.before(hour))
            + entries.map_or(0, |entries| entries.before(micros))
    }

    /// The hours with agents, in order.
    pub(super) fn hours(&self) -> impl Iterator<Item = i64> {
        self.all_hours().map(|(hour, _)| hour)
    }

    fn all_hours(&self) -> impl Iterator<Item = (i64, &AgentHour)> {
        self.blocks.iter().flat_map(|(_, hours)| hours.iter())
    }

    /// Appends the saved form of an hour. False: it has no agents.
    pub(super) fn write_hour(&self, hour: i64, to: &mut Vec<u8>) -> bool {
        let entries = self.blocks.get(hour.div_euclid(BLOCK)).and_then(|hours| hours.get(hour));
        entries.map(|entries| entries.write(hour * HOUR, to)).is_some()
    }

    /// Adds the saved form of an hour that has no agents yet.
    pub(super) fn read_hour(&mut self, hour: i64, bytes: &[u8]) -> Result<(), &'static str> {
        let start = hour.checked_mul(HOUR).ok_or("its hour is beyond all time")?;
        let read = AgentHour::read(start, bytes)?;
        let total = read.total();
        *self.blocks.add(hour.div_euclid(BLOCK), total).add(hour, total) = read;
        Ok(())
    }

    fn entries(&self) -> impl Iterator<Item = &(i64, u64)> {
        self.all_hours().flat_map(|(_, hour)| hour.entries())
    }
}

/// The numbers of the block and of the hour of an instant.
fn place_of(micros: i64) -> (i64, i64) {
    let hour = micros.div_euclid(HOUR);
    (hour.div_euclid(BLOCK), hour)
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
    fn a_count_of_a_million_events_reads_a_few_thousand_numbers() {
        // All within one day, so that totals of days cannot give any count; every third event is
        // late.
        let mut counts = AgentCounts::default();
        for i in 0..1_000_000_i64 {
            counts.add(at(if i % 3 == 0 { i * 7 } else { i * 80_000 }), 1);
        }
        assert_eq!(counts.events(), 1_000_000);
        // a count reads one run, and the totals of an hour's other runs, of a block and of blocks
        let lengths = counts.all_hours().map(|(_, hour)| hour.run_lengths().collect::<Vec<_>>());
        for runs in lengths {
            assert!(runs.iter().all(|entries| (1..=1024).contains(entries)));
            assert!(runs.len() <= 2 * runs.iter().sum::<usize>() / 1024 + 1, "{} runs", runs.len());
        }
        assert!(counts.blocks.0.iter().all(|block| block.part.0.len() <= 128));
    }

    /// The saved form of every hour.
    fn saved(counts: &AgentCounts) -> Vec<(i64, Vec<u8>)> {
        let hours = counts.hours();
        hours
            .map(|hour| {
                let mut bytes = Vec::new();
                assert!(counts.write_hour(hour, &mut bytes));
                (hour, bytes)
            })
            .collect()
    }

    fn close_events() -> impl Strategy<Value = Vec<(i64, u64)>> {
        prop::collection::vec((0..3000_i64, 1..5_u64), 0..2500)
    }

    /// Within one hour, over some hours, over some blocks.
    fn scale() -> impl Strategy<Value = i64> {
        prop_oneof![Just(1_i64), Just(HOUR / 1000), Just(HOUR)]
    }

    fn events() -> impl Strategy<Value = Vec<(i64, u64)>> {
        (close_events(), scale()).prop_map(|(events, scale)| scaled(&events, scale))
    }

    fn scaled(events: &[(i64, u64)], scale: i64) -> Vec<(i64, u64)> {
        events.iter().map(|(micros, count)| (micros * scale, *count)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_count_equals_counting_one_by_one(events in close_events(), scale in scale(), start in -10..3100_i64, end in -10..3100_i64) {
            let expected: u64 = events.iter().filter(|(micros, _)| (start..end).contains(micros)).map(|(_, count)| count).sum();
            let counts = counts(&scaled(&events, scale));
            prop_assert_eq!(counts.count(at(start * scale), at(end * scale)), u128::from(expected));
        }

        #[test]
        fn any_order_gives_an_equal_value_and_an_equal_snapshot((one, other) in events().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))) {
            let (one, other) = (counts(&one), counts(&other));
            prop_assert_eq!(saved(&one), saved(&other));
            prop_assert_eq!(one, other);
        }

        #[test]
        fn removed_events_leave_the_value_of_the_others(kept in events(), removed in events()) {
            let mut all = counts(&[kept.clone(), removed.clone()].concat());
            for (micros, count) in &removed {
                let hour = all.remove(at(*micros), *count);
                prop_assert_eq!(hour, Some(micros.div_euclid(HOUR)));
            }
            let lengths = all.all_hours().flat_map(|(_, hour)| hour.run_lengths());
            prop_assert!(lengths.into_iter().all(|entries| entries > 0));
            let kept = counts(&kept);
            prop_assert_eq!(saved(&all), saved(&kept));
            prop_assert_eq!(all.before(i64::MAX), kept.before(i64::MAX));
            prop_assert_eq!(all.remove(at(-1), 1), None, "it was never added");
            prop_assert_eq!(all, kept);
        }

        #[test]
        fn a_restored_value_continues_as_if_never_saved(before in events(), after in events()) {
            let mut restored = AgentCounts::default();
            for (hour, bytes) in saved(&counts(&before)) {
                restored.read_hour(hour, &bytes).unwrap();
            }
            for (micros, count) in &after {
                restored.add(at(*micros), *count);
            }
            prop_assert_eq!(restored, counts(&[before, after].concat()));
        }
    }
}
