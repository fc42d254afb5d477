//! Detects partitions that do not move while records wait. A member that still sends heartbeats can be stuck, so only progress counts.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::event::{Topic, TopicPartition};

/// Each stall without a move in between doubles the time until the next one, at most this many times.
const DOUBLINGS: u32 = 4;

/// The progress of the partitions that are read. It uses only the instants that the caller passes.
#[derive(Debug)]
pub struct Progress {
    /// How long records may wait.
    patience: Duration,
    partitions: BTreeMap<TopicPartition, Seen>,
    /// The number of consecutive stalls of a partition, until it moves.
    stalls: HashMap<TopicPartition, u32>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    position: i64,
    /// When the partition last moved or had nothing to read.
    at: DateTime<Utc>,
    /// The position at the last check.
    looked: Option<i64>,
    /// Since when records have waited at this position.
    waiting_since: Option<Instant>,
}

/// A partition that does not move while records wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    pub partition: TopicPartition,
    pub position: i64,
    /// The end of the log.
    pub end: i64,
    /// How long records have waited.
    pub waited: Duration,
}

impl Progress {
    /// Progress without partitions; records may wait for `patience`.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Progress { patience, partitions: BTreeMap::new(), stalls: HashMap::new() }
    }

    /// The interval between checks.
    #[must_use]
    pub fn look_every(&self) -> Duration {
        (self.patience / 4).clamp(Duration::from_millis(50), Duration::from_secs(2))
    }

    /// Starts a partition at this position.
    pub fn started(&mut self, partition: TopicPartition, position: i64, at: DateTime<Utc>) {
        self.partitions.insert(partition, Seen { position, at, looked: None, waiting_since: None });
    }

    /// Records the partition's new position.
    pub fn moved(&mut self, partition: TopicPartition, position: i64, at: DateTime<Utc>) {
        if let Some(seen) = self.partitions.get_mut(&partition).filter(|seen| seen.position != position) {
            *seen = Seen { position, at, waiting_since: None, ..*seen };
            self.stalls.remove(&partition);
        }
    }

    /// Removes a partition that is not read any more: it was revoked, paused, or stopped by a fault.
    pub fn ended(&mut self, partition: TopicPartition) {
        self.partitions.remove(&partition);
    }

    pub fn all_ended(&mut self) {
        self.partitions.clear();
    }

    /// The partition's position; none if it is not read.
    #[must_use]
    pub fn position(&self, partition: TopicPartition) -> Option<i64> {
        self.partitions.get(&partition).map(|seen| seen.position)
    }

    /// The partitions that have not moved since the last call, whose log end is worth a request.
    pub fn suspects(&mut self) -> Vec<TopicPartition> {
        let moved = |seen: &mut Seen| seen.looked.replace(seen.position) != Some(seen.position);
        self.partitions.iter_mut().filter_map(|(partition, seen)| (!moved(seen)).then_some(*partition)).collect()
    }

    /// Records that the log ends at `end`. Returns a stall once records have waited too long.
    pub fn look(&mut self, partition: TopicPartition, end: i64, now: Instant, at: DateTime<Utc>) -> Option<Stall> {
        let seen = self.partitions.get_mut(&partition)?;
        if end <= seen.position {
            (seen.at, seen.waiting_since) = (at, None);
            return None;
        }
        let waited = now.duration_since(*seen.waiting_since.get_or_insert(now));
        let doublings = self.stalls.get(&partition).copied().unwrap_or_default().min(DOUBLINGS);
        (waited >= self.patience * 2_u32.pow(doublings)).then_some(Stall { partition, position: seen.position, end, waited })
    }

    /// Records that the consumer left because of a stall; the next one takes longer.
    pub fn stalled(&mut self, partition: TopicPartition) {
        *self.stalls.entry(partition).or_default() += 1;
    }

    /// Records that no record is readable after the position, although the log ends later: control records, or an open transaction.
    pub fn nothing_waits(&mut self, partition: TopicPartition) {
        if let Some(seen) = self.partitions.get_mut(&partition) {
            seen.waiting_since = None;
        }
    }

    /// Each partition that is read, its position, and when it last moved or had nothing to read.
    pub fn partitions(&self) -> impl Iterator<Item = (TopicPartition, i64, DateTime<Utc>)> {
        self.partitions.iter().map(|(partition, seen)| (*partition, seen.position, seen.at))
    }

    /// Per topic, the time of the partition that has gone longest without progress. None: no partition of it is read.
    #[must_use]
    pub fn oldest(&self) -> [(Topic, Option<DateTime<Utc>>); 3] {
        Topic::ALL.map(|topic| (topic, self.partitions().filter(|(partition, ..)| partition.topic == topic).map(|(_, _, at)| at).min()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: TopicPartition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };

    /// A patience of one minute, a partition at position 10, and instants in seconds.
    fn started() -> (Progress, impl Fn(u64) -> Instant) {
        let mut progress = Progress::new(Duration::from_secs(60));
        progress.started(AT, 10, DateTime::UNIX_EPOCH);
        let begin = Instant::now();
        (progress, move |seconds| begin + Duration::from_secs(seconds))
    }

    fn look(progress: &mut Progress, end: i64, now: Instant) -> Option<Stall> {
        progress.look(AT, end, now, DateTime::UNIX_EPOCH)
    }

    #[test]
    fn records_that_wait_for_so_long_while_nothing_moves_are_a_stall() {
        let (mut progress, at) = started();
        assert_eq!(look(&mut progress, 11, at(100)), None);
        assert_eq!(look(&mut progress, 15, at(159)), None);
        let stall = Stall { partition: AT, position: 10, end: 15, waited: Duration::from_secs(60) };
        assert_eq!(look(&mut progress, 15, at(160)), Some(stall));
    }

    #[test]
    fn a_partition_without_records_never_stalls_and_waits_only_from_when_they_come() {
        let (mut progress, at) = started();
        for seconds in [0, 1_000, 2_000] {
            assert_eq!(look(&mut progress, 10, at(seconds)), None);
        }
        assert_eq!(look(&mut progress, 11, at(3_000)), None, "the record has only come");
        assert_eq!(look(&mut progress, 11, at(3_059)), None);
        assert!(look(&mut progress, 11, at(3_060)).is_some());
    }

    #[test]
    fn one_step_is_progress_and_the_same_position_told_again_is_none() {
        let (mut progress, at) = started();
        look(&mut progress, 20, at(0));
        progress.moved(AT, 11, DateTime::UNIX_EPOCH);
        assert_eq!(look(&mut progress, 20, at(60)), None);
        progress.moved(AT, 11, DateTime::UNIX_EPOCH);
        assert!(look(&mut progress, 20, at(120)).is_some());
    }

    #[test]
    fn what_is_not_read_does_not_stall() {
        let (mut progress, at) = started();
        look(&mut progress, 20, at(0));
        progress.ended(AT);
        assert_eq!(look(&mut progress, 20, at(600)), None);
        progress.started(AT, 10, DateTime::UNIX_EPOCH);
        assert_eq!(look(&mut progress, 20, at(601)), None, "started again, it has all the time again");
        progress.nothing_waits(AT);
        assert_eq!(look(&mut progress, 20, at(661)), None);
    }

    #[test]
    fn each_stall_in_a_row_is_waited_for_twice_as_long_up_to_sixteen_times() {
        let (mut progress, at) = started();
        let mut begun = 0;
        for patience in [60, 120, 240, 480, 960, 960] {
            progress.started(AT, 10, DateTime::UNIX_EPOCH);
            assert_eq!(look(&mut progress, 20, at(begun)), None);
            assert_eq!(look(&mut progress, 20, at(begun + patience - 1)), None, "{patience}");
            assert!(look(&mut progress, 20, at(begun + patience)).is_some(), "{patience}");
            progress.stalled(AT);
            begun += patience;
        }
        progress.moved(AT, 11, DateTime::UNIX_EPOCH);
        look(&mut progress, 20, at(begun));
        assert!(look(&mut progress, 20, at(begun + 60)).is_some(), "progress has made it forget");
    }

    #[test]
    fn only_partitions_that_did_not_move_are_asked_about() {
        let (mut progress, _) = started();
        assert_eq!(progress.suspects(), []);
        assert_eq!(progress.suspects(), [AT]);
        progress.moved(AT, 11, DateTime::UNIX_EPOCH);
        assert_eq!(progress.suspects(), []);
        assert_eq!(progress.suspects(), [AT]);
    }
}
