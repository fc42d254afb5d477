//! Ids that the log has acknowledged and that a later pass will read again.

use std::collections::HashMap;
use std::hash::Hash;

use crate::coderd::Time;

/// Bounded memory. A forgotten id is looked up in the ledger. If the ledger does not have it yet,
/// it is appended again and becomes a duplicate.
#[derive(Debug)]
pub(super) struct SeenIds<Id> {
    ids: HashMap<Id, Entry>,
    limit: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    at: Time,
    /// The pass of this process.
    pass: u64,
}

impl<Id: Eq + Hash> SeenIds<Id> {
    pub(super) fn new(limit: usize) -> Self {
        SeenIds { ids: HashMap::new(), limit }
    }

    pub(super) fn contains(&self, id: &Id) -> bool {
        self.ids.contains_key(id)
    }

    /// Remembers an id. Beyond the limit it forgets the earlier half by time.
    pub(super) fn insert(&mut self, id: Id, at: impl Into<Time>, pass: u64) {
        self.ids.insert(id, Entry { at: at.into(), pass });
        if self.ids.len() > self.limit {
            let mut times: Vec<Time> = self.ids.values().map(|entry| entry.at).collect();
            let middle = times.len() / 2;
            let (_, median, _) = times.select_nth_unstable(middle);
            let median = *median;
            self.ids.retain(|_, entry| entry.at > median);
        }
    }

    /// Forgets ids dated before `before` whose pass is in the ledger. Incremental passes do not
    /// read them again, and a look-up finds them.
    pub(super) fn forget(&mut self, before: impl Into<Time>, pass_in_ledger: u64) {
        let before = before.into();
        self.ids.retain(|_, entry| entry.at >= before || entry.pass > pass_in_ledger);
    }

    /// Forgets an id if its pass is known to be in the ledger. Then a look-up shows whether the
    /// ledger has it.
    pub(super) fn forget_if_recorded(&mut self, id: &Id, pass_in_ledger: u64) {
        if self.ids.get(id).is_some_and(|entry| entry.pass <= pass_in_ledger) {
            self.ids.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};

    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    #[test]
    fn an_id_is_forgotten_only_when_it_is_old_and_in_the_ledger() {
        let mut seen = SeenIds::new(100);
        seen.insert("old, in the ledger", at(1), 1);
        seen.insert("old, still in the log only", at(1), 2);
        seen.insert("recent", at(10), 1);
        seen.forget(at(5), 1);
        assert!(!seen.contains(&"old, in the ledger"));
        assert!(seen.contains(&"old, still in the log only"));
        assert!(seen.contains(&"recent"));
    }

    #[test]
    fn memory_is_bounded_and_the_latest_ids_remain() {
        let mut seen = SeenIds::new(100);
        for number in 0..1000 {
            seen.insert(number, at(number), 1);
            assert!(seen.ids.len() <= 100);
        }
        assert!(seen.contains(&999));
        assert!(!seen.contains(&0));
    }
}
