//! Offsets of a partition without a record: control records, and records of aborted transactions.

use std::collections::HashMap;

use crate::event::TopicPartition;

/// A range of offsets without a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) partition: TopicPartition,
    pub(super) from: i64,
    pub(super) until: i64,
}

/// The latest check of each partition that found no record.
///
/// One check is not enough: the leader may change between the requests for the end and for the
/// records. The answer of a follower that is behind looks like a range without records.
#[derive(Debug, Default)]
pub(super) struct GapWatch(HashMap<TopicPartition, Gap>);

impl GapWatch {
    /// Records a check that found no record. Returns the range in which it agrees with the previous
    /// check.
    pub(super) fn note_empty(&mut self, gap: Gap) -> Option<Gap> {
        let before = self.0.insert(gap.partition, gap).filter(|before| before.from == gap.from)?;
        Some(Gap { until: gap.until.min(before.until), ..gap })
    }

    /// Records a check that found a record or had no answer.
    pub(super) fn clear(&mut self, partition: TopicPartition) {
        self.0.remove(&partition);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Topic;

    const AT: TopicPartition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };

    fn gap(from: i64, until: i64) -> Gap {
        Gap { partition: AT, from, until }
    }

    #[test]
    fn a_gap_needs_two_consecutive_checks_that_agree() {
        let mut watch = GapWatch::default();
        assert_eq!(
            watch.note_empty(gap(10, 12)),
            None,
            "the leader may have changed during one check"
        );
        assert_eq!(watch.note_empty(gap(10, 12)), Some(gap(10, 12)));
        assert_eq!(watch.note_empty(gap(12, 14)), None, "the position has moved");
        watch.clear(AT);
        assert_eq!(watch.note_empty(gap(12, 14)), None, "a record was found in between");
        let elsewhere = Gap { partition: TopicPartition { partition: 1, ..AT }, ..gap(12, 14) };
        assert_eq!(watch.note_empty(elsewhere), None, "another partition");
    }

    #[test]
    fn checks_with_different_ends_agree_up_to_the_earlier_end() {
        let mut watch = GapWatch::default();
        watch.note_empty(gap(10, 12));
        assert_eq!(watch.note_empty(gap(10, 20)), Some(gap(10, 12)));
        assert_eq!(watch.note_empty(gap(10, 15)), Some(gap(10, 15)));
    }
}
