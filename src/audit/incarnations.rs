//! Compares a head that was printed earlier with the chain. The acts `recover`, which the chain
//! covers, name each incarnation and the sequence up to which a restored ledger has its batches.

use uuid::Uuid;

use super::deep_findings::DeepFindings;
use crate::ledger::{Difference, Head, Restore};

/// The incarnations of the ledger.
pub(super) struct Incarnations {
    pub(super) current: Uuid,
    /// The restores that acts `recover` record, in the order of their sequences.
    pub(super) restores: Vec<Restore>,
}

/// The batches of an incarnation that this ledger must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shared {
    All,
    /// Up to this sequence. The ledger was restored since, and may lack later ones.
    UpTo(i64),
    /// No act names the incarnation, and no restore can have ended it.
    None,
}

impl Incarnations {
    /// Compares the current incarnation with the newest act that began one.
    pub(super) fn check(&self, found: &mut DeepFindings) {
        if let Some(newest) = self.restores.last()
            && newest.began != self.current
        {
            let detail = format!("the newest act `recover` began the incarnation {}", newest.began);
            found.differs("incarnation_off_its_act", self.current.to_string(), detail);
        }
    }

    /// An incarnation that no act names can be one that began after the backup of a restore. The
    /// ledger has its batches up to the first restore at least.
    fn shared(&self, incarnation: Uuid) -> Shared {
        let up_to = |restore: &Restore| restore.up_to;
        let ended = self.restores.iter().filter(|restore| restore.ended.contains(&incarnation));
        if let Some(up_to) = ended.map(up_to).min() {
            return Shared::UpTo(up_to);
        }
        let began = self.restores.iter().any(|restore| restore.began == incarnation);
        match self.restores.iter().map(up_to).min() {
            _ if began => Shared::All,
            Some(up_to) => Shared::UpTo(up_to),
            None if incarnation == self.current => Shared::All,
            None => Shared::None,
        }
    }

    /// Judges a head that was printed earlier. `chain` is the ledger's chain at its sequence.
    pub(super) fn compare(
        &self,
        earlier: Head,
        chain: Option<Vec<u8>>,
        until: Head,
        found: &mut DeepFindings,
    ) {
        let number = earlier.sequence.number;
        let chain = if number == 0 { Some(vec![0; 32]) } else { chain };
        if chain.as_deref() == Some(earlier.chain.as_slice()) {
            return found.joint.number("batches_up_to_the_given_head", number);
        }
        let (id, until) = (earlier.sequence.to_string(), until.sequence);
        let (kind, detail) = match self.shared(earlier.sequence.incarnation) {
            Shared::UpTo(up_to) if number > up_to => {
                let detail = format!(
                    "head of an earlier incarnation: the ledger was restored since and is now {until}. It may lack batches after the sequence \
                     {up_to}; the acts `recover` say when"
                );
                let kind = "head_of_an_earlier_incarnation".into();
                return found.joint.open.push(Difference { kind, id, detail });
            }
            Shared::All if number > until.number => {
                let detail = format!(
                    "the ledger ends at {until}: its newest batches were removed. If it was restored from a backup, run `recover plan --lost ledger`"
                );
                ("head_beyond_the_ledger", detail)
            }
            Shared::All | Shared::UpTo(_) => {
                let detail = "the chain has another value there: batches up to it were changed, and the chain was recomputed";
                ("head_differs", detail.to_owned())
            }
            Shared::None => {
                let detail = "the ledger never had this incarnation, and no act recovered it";
                ("head_of_another_ledger", detail.to_owned())
            }
        };
        found.differs(kind, id, detail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_shares_the_batches_before_the_restore_that_ended_it() {
        let id = Uuid::from_u128;
        let restore = |ended: &[u128], began: u128, up_to| Restore {
            ended: ended.iter().copied().map(id).collect(),
            began: id(began),
            up_to,
        };
        let ledger = |current, restores: &[Restore]| Incarnations {
            current: id(current),
            restores: restores.to_vec(),
        };
        let never = ledger(1, &[]);
        assert_eq!((never.shared(id(1)), never.shared(id(9))), (Shared::All, Shared::None));
        let twice = ledger(3, &[restore(&[1], 2, 50), restore(&[2, 1], 3, 80)]);
        let shared = [1, 2, 3, 9].map(|one| twice.shared(id(one)));
        assert_eq!(shared, [Shared::UpTo(50), Shared::UpTo(80), Shared::All, Shared::UpTo(50)]);
        // the row of the ledger was changed by hand
        let changed = ledger(7, &[restore(&[1], 2, 50)]);
        assert_eq!((changed.shared(id(2)), changed.shared(id(7))), (Shared::All, Shared::UpTo(50)));
    }
}
