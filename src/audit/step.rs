//! A step of the continuous audit at one joint, from a comparison of all of it.

pub(super) use crate::ledger::{AuditItem as Item, AuditStep as Step};

use super::joint::{Joint, RECENT_USAGE_DIFFERS, SOURCE_GONE};

/// The step of a comparison that judged everything.
pub(super) fn whole(joint: &Joint, known: &[Item]) -> Step {
    // which of the differing usage is recent is not known here: the first ones stand for all
    let mut recent = joint.count(RECENT_USAGE_DIFFERS);
    let differences = joint.differences.iter().cloned().map(|difference| {
        let is_recent_usage = recent > 0;
        recent -= i64::from(is_recent_usage);
        Item { is_recent_usage, ..Item::difference(difference) }
    });
    let open =
        joint.open.iter().cloned().map(|open| Item { is_open: true, ..Item::difference(open) });
    let items: Vec<Item> = differences.chain(open).collect();
    Step {
        judged: known.iter().chain(&items).map(|item| item.id.clone()).collect(),
        items,
        progress: serde_json::Value::Null,
        gone: joint.count(SOURCE_GONE),
        behind: false,
    }
}
