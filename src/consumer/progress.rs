//! Detects partitions that do not move while records wait. A member that still sends heartbeats can
//! be stuck, so only progress counts.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::event::{Topic, TopicPartition};

/// Each stall without a move in between doubles the time until the next one, at most this many
/// times.
const DOUBLINGS: u32 = 4;

/// The progress of the partitions that are read. It uses only the instants that the caller passes.
#[derive(Debug)]
pub struct Progress {
    /// How long records may wait.
    limit: Duration,
    partitions: BTreeMap<TopicPartition, PartitionState>,
    /// The number of consecutive stalls of a partition, until it moves.
    stalls: HashMap<TopicPartition, u32>,
}

#[derive(Clone, Copy, Debug)]
struct PartitionState {
    position: i64,
    /// When the partition last moved or had nothing to read.
    at: DateTime<Utc>,
    /// The position at the last check.
    checked: Option<i64>,
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
    /// Progress without partitions; records may wait for `limit`.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Progress { limit, partitions: BTreeMap::new(), stalls: HashMap::new() }
    }

    /// The interval between checks.
    #[must_use]
    pub fn check_interval(&self) -> Duration {
        (self.limit / 4).clamp(Duration::from_millis(50), Duration::from_secs(2))
    }

    /// Starts a partition at this position.
    pub fn start(&mut self, partition: TopicPartition, position: i64, at: DateTime<Utc>) {
        self.partitions
            .insert(partition, PartitionState { position, at, checked: None, waiting_since: None });
    }

    /// Records the partition's new position.
    pub fn advance(&mut self, partition: TopicPartition, position: i64, at: DateTime<Utc>) {
        if let Some(state) =
            self.partitions.get_mut(&partition).filter(|state| state.position != position)
        {
            *state = PartitionState { position, at, waiting_since: None, ..*state };
            self.stalls.remove(&partition);
        }
    }

    /// Removes a partition that is not read any more: it was revoked, paused, or stopped by a
    /// fault.
    pub fn end(&mut self, partition: TopicPartition) {
        self.partitions.remove(&partition);
    }

    pub fn end_all(&mut self) {
        self.partitions.clear();
    }

    /// The partition's position; none if it is not read.
    #[must_use]
    pub fn position(&self, partition: TopicPartition) -> Option<i64> {
        self.partitions.get(&partition).map(|state| state.position)
    }

    /// The partitions that have not moved since the last call, whose log end is worth a request.
    pub fn suspects(&mut self) -> Vec<TopicPartition> {
        let moved = |state: &mut PartitionState| {
            state.checked.replace(state.position) != Some(state.position)
        };
        self.partitions
            .iter_mut()
            .filter_map(|(partition, state)| (!moved(state)).then_some(*partition))
            .collect()
    }

    /// Records that the log ends at `end`. Returns a stall once records have waited too long.
    pub fn check(
        &mut self,
        partition: TopicPartition,
        end: i64,
        now: Instant,
        at: DateTime<Utc>,
    ) -> Option<Stall> {
        let state = self.partitions.get_mut(&partition)?;
        if end <= state.position {
            (state.at, state.waiting_since) = (at, None);
            return None;
        }
        let waited = now.duration_since(*state.waiting_since.get_or_insert(now));
        let doublings = self.stalls.get(&partition).copied().unwrap_or_default().min(DOUBLINGS);
        (waited >= self.limit * 2_u32.pow(doublings)).then_some(Stall {
            partition,
            position: state.position,
            end,
            waited,
        })
    }

    /// Records that the consumer left because of a stall; the next one takes longer.
    pub fn note_stall(&mut self, partition: TopicPartition) {
        *self.stalls.entry(partition).or_default() += 1;
    }

    /// Records that no record is readable after the position, although the log ends later: control
    /// records, or an open transaction.
    pub fn clear_backlog(&mut self, partition: TopicPartition) {
        if let Some(state) = self.partitions.get_mut(&partition) {
            state.waiting_since = None;
        }
    }

    /// Each partition that is read, its position, and when it last moved or had nothing to read.
    pub fn partitions(&self) -> impl Iterator<Item = (TopicPartition, i64, DateTime<Utc>)> {
        self.partitions.iter().map(|(partition, state)| (*partition, state.position, state.at))
    }

    /// Per topic, the time of the partition that has gone longest without progress. None: no
    /// partition of it is read.
    #[must_use]
    pub fn oldest(&self) -> [(Topic, Option<DateTime<Utc>>); 3] {
        Topic::ALL.map(|topic| {
            (
                topic,
                self.partitions()
                    .filter(|(partition, ..)| partition.topic == topic)
                    .map(|(_, _, at)| at)
                    .min(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: TopicPartition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };

    /// A limit of one minute, a partition at position 10, and instants in seconds.
    fn started() -> (Progress, impl Fn(u64) -> Instant) {
        let mut progress = Progress::new(Duration::from_secs(60));
        progress.start(AT, 10, DateTime::UNIX_EPOCH);
        let begin = Instant::now();
        (progress, move |seconds| begin + Duration::from_secs(seconds))
    }

    fn check(progress: &mut Progress, end: i64, now: Instant) -> Option<Stall> {
        progress.check(AT, end, now, DateTime::UNIX_EPOCH)
    }

    #[test]
    fn records_that_wait_for_the_limit_without_progress_are_a_stall() {
        let (mut progress, at) = started();
        assert_eq!(check(&mut progress, 11, at(100)), None);
        assert_eq!(check(&mut progress, 15, at(159)), None);
        let stall = Stall { partition: AT, position: 10, end: 15, waited: Duration::from_secs(60) };
        assert_eq!(check(&mut progress, 15, at(160)), Some(stall));
    }

    #[test]
    fn an_empty_partition_never_stalls_and_the_wait_begins_with_the_first_record() {
        let (mut progress, at) = started();
        for seconds in [0, 1_000, 2_000] {
            assert_eq!(check(&mut progress, 10, at(seconds)), None);
        }
        assert_eq!(check(&mut progress, 11, at(3_000)), None, "the record has just arrived");
        assert_eq!(check(&mut progress, 11, at(3_059)), None);
        assert!(check(&mut progress, 11, at(3_060)).is_some());
    }

    #[test]
    fn a_new_position_is_progress_and_a_repeated_position_is_not() {
        let (mut progress, at) = started();
        check(&mut progress, 20, at(0));
        progress.advance(AT, 11, DateTime::UNIX_EPOCH);
        assert_eq!(check(&mut progress, 20, at(60)), None);
        progress.advance(AT, 11, DateTime::UNIX_EPOCH);
        assert!(check(&mut progress, 20, at(120)).is_some());
    }

    #[test]
    fn a_partition_that_is_not_read_does_not_stall() {
        let (mut progress, at) = started();
        check(&mut progress, 20, at(0));
        progress.end(AT);
        assert_eq!(check(&mut progress, 20, at(600)), None);
        progress.start(AT, 10, DateTime::UNIX_EPOCH);
        assert_eq!(check(&mut progress, 20, at(601)), None, "a restart resets the wait");
        progress.clear_backlog(AT);
        assert_eq!(check(&mut progress, 20, at(661)), None);
    }

    #[test]
    fn each_consecutive_stall_doubles_the_limit_up_to_sixteen_times() {
        let (mut progress, at) = started();
        let mut begun = 0;
        for limit in [60, 120, 240, 480, 960, 960] {
            progress.start(AT, 10, DateTime::UNIX_EPOCH);
            assert_eq!(check(&mut progress, 20, at(begun)), None);
            assert_eq!(check(&mut progress, 20, at(begun + limit - 1)), None, "{limit}");
            assert!(check(&mut progress, 20, at(begun + limit)).is_some(), "{limit}");
            progress.note_stall(AT);
            begun += limit;
        }
        progress.advance(AT, 11, DateTime::UNIX_EPOCH);
        check(&mut progress, 20, at(begun));
        assert!(check(&mut progress, 20, at(begun + 60)).is_some(), "progress resets the limit");
    }

    #[test]
    fn only_partitions_without_progress_are_checked() {
        let (mut progress, _) = started();
        assert_eq!(progress.suspects(), []);
        assert_eq!(progress.suspects(), [AT]);
        progress.advance(AT, 11, DateTime::UNIX_EPOCH);
        assert_eq!(progress.suspects(), []);
        assert_eq!(progress.suspects(), [AT]);
    }
}
