//! Managed agents of one hour, in order and in their saved form.

use std::sync::Arc;

/// Maximum entries of a run. A new entry moves at most this number.
const RUN: usize = 1024;

/// Microseconds of an hour.
pub(super) const HOUR: i64 = 3_600_000_000;

/// An entry: microseconds since the Unix epoch, and the number of agents.
type Started = (i64, u64);

/// The entries of an hour, in ordered runs with their totals. A count reads one run and the totals
/// of the runs before it. A clone shares the entries.
#[derive(Clone, Debug, Default)]
pub(super) struct AgentHour {
    runs: Vec<Run>,
}

/// A non-empty, ordered run.
#[derive(Clone, Debug)]
struct Run {
    entries: Arc<Vec<Started>>,
    total: u128,
}

impl Run {
    fn of(entries: Vec<Started>) -> Self {
        Self { total: sum(&entries), entries: Arc::new(entries) }
    }

    fn last(&self) -> Option<&Started> {
        self.entries.last()
    }
}

fn sum(entries: &[Started]) -> u128 {
    entries.iter().map(|(_, count)| u128::from(*count)).sum()
}

impl AgentHour {
    /// Number of agents started before this instant.
    pub(super) fn before(&self, micros: i64) -> u128 {
        let first = self.runs.partition_point(|run| run.last().is_some_and(|(at, _)| *at < micros));
        let whole: u128 = self.runs[..first].iter().map(|run| run.total).sum();
        let part = self.runs.get(first).map_or(0, |run| {
            sum(&run.entries[..run.entries.partition_point(|(at, _)| *at < micros)])
        });
        whole + part
    }

    pub(super) fn insert(&mut self, entry: Started) {
        let first_reaching = self.runs.partition_point(|run| run.last() < Some(&entry));
        let index = first_reaching.min(self.runs.len().saturating_sub(1));
        let Some(run) = self.runs.get_mut(index) else {
            self.runs.push(Run::of(vec![entry]));
            return;
        };
        let place = run.entries.partition_point(|other| *other <= entry);
        if run.entries.len() < RUN {
            Arc::make_mut(&mut run.entries).insert(place, entry);
            run.total += u128::from(entry.1);
        } else if place == RUN {
            // After a full run: events in the order of time fill each run before the next one
            // begins.
            self.runs.insert(index + 1, Run::of(vec![entry]));
        } else {
            let upper = Arc::make_mut(&mut run.entries).split_off(RUN / 2);
            run.total = sum(&run.entries);
            self.runs.insert(index + 1, Run::of(upper));
            self.insert(entry);
        }
    }

    pub(super) fn contains(&self, entry: &Started) -> bool {
        self.place(entry).is_some()
    }

    /// Removes one such entry, if there is one. Moves at most a run.
    pub(super) fn remove(&mut self, entry: &Started) {
        let Some((index, place)) = self.place(entry) else { return };
        let run = &mut self.runs[index];
        Arc::make_mut(&mut run.entries).remove(place);
        run.total -= u128::from(entry.1);
        if run.entries.is_empty() {
            self.runs.remove(index);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The run with this entry, and its place there.
    fn place(&self, entry: &Started) -> Option<(usize, usize)> {
        let index = self.runs.partition_point(|run| run.last() < Some(entry));
        let place = self.runs.get(index)?.entries.binary_search(entry).ok()?;
        Some((index, place))
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Started> {
        self.runs.iter().flat_map(|run| run.entries.iter())
    }

    pub(super) fn total(&self) -> u128 {
        self.runs.iter().map(|run| run.total).sum()
    }

    /// Appends the saved form: for each entry the microseconds since the entry before it (for the
    /// first one since the hour's `start`), doubled, and 1 more if a count other than 1 follows.
    /// Numbers have 7 bits a byte, the lowest first; a set high bit continues the number.
    pub(super) fn write(&self, start: i64, to: &mut Vec<u8>) {
        let mut last = start;
        for (at, count) in self.entries() {
            write_number((at - last).unsigned_abs() * 2 + u64::from(*count != 1), to);
            if *count != 1 {
                write_number(*count, to);
            }
            last = *at;
        }
    }

    /// Reads the saved form of the hour that begins at `start`. Allocates at most 16 times the
    /// length of the bytes.
    pub(super) fn read(start: i64, mut bytes: &[u8]) -> Result<Self, &'static str> {
        let end = start.checked_add(HOUR).ok_or("its hour is beyond all time")?;
        let (mut entries, mut last) = (Vec::new(), (start, 0));
        while !bytes.is_empty() {
            let number = read_number(&mut bytes)?;
            let delta = i64::try_from(number / 2).map_err(|_| "a number is too large")?;
            let at = last.0.checked_add(delta).filter(|at| *at < end);
            let at = at.ok_or("an agent started after its hour")?;
            let count = if number % 2 == 1 { read_number(&mut bytes)? } else { 1 };
            if (at, count) < last {
                return Err("its agents are not ordered");
            }
            last = (at, count);
            entries.push(last);
        }
        if entries.is_empty() {
            return Err("it has no agents");
        }
        Ok(Self { runs: entries.chunks(RUN).map(|run| Run::of(run.to_vec())).collect() })
    }

    #[cfg(test)]
    pub(super) fn run_lengths(&self) -> impl Iterator<Item = usize> {
        self.runs.iter().map(|run| run.entries.len())
    }
}

fn write_number(mut number: u64, to: &mut Vec<u8>) {
    while number >= 0x80 {
        to.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    to.push(number.to_le_bytes()[0]);
}

fn read_number(bytes: &mut &[u8]) -> Result<u64, &'static str> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or("it ends in the middle of a number")?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return Err("a number is too large");
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err("a number is too large")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_saved_form_is_pinned() {
        let mut hour = AgentHour::default();
        for entry in [(HOUR, 1), (HOUR + 200, 3), (HOUR + 200, u64::MAX)] {
            hour.insert(entry);
        }
        let mut bytes = Vec::new();
        hour.write(HOUR, &mut bytes);
        let max = [255, 255, 255, 255, 255, 255, 255, 255, 255, 1];
        assert_eq!(bytes, [&[0, 0x91, 0x03, 3, 1][..], &max].concat());
    }

    proptest! {
        #[test]
        fn a_saved_hour_reads_back(mut entries in prop::collection::vec((0..HOUR, prop_oneof![Just(1_u64), any::<u64>()]), 1..3000), hour in -400_000..800_000_i64) {
            let start = hour * HOUR;
            entries.iter_mut().for_each(|(at, _)| *at += start);
            let mut one = AgentHour::default();
            entries.iter().for_each(|entry| one.insert(*entry));
            entries.sort_unstable();
            let mut bytes = Vec::new();
            one.write(start, &mut bytes);
            let read = AgentHour::read(start, &bytes).unwrap();
            prop_assert!(read.entries().eq(&entries));
            prop_assert_eq!(read.total(), one.total());
        }

        #[test]
        fn any_bytes_are_an_hour_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), start: i64) {
            if let Ok(hour) = AgentHour::read(start, &bytes) {
                let mut again = Vec::new();
                hour.write(start, &mut again);
                prop_assert!(again.len() <= bytes.len());
                prop_assert!(AgentHour::read(start, &again).unwrap().entries().eq(hour.entries()));
            }
        }
    }
}
