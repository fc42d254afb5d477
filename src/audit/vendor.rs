//! Compares ledger and vendor. Accepted usage is published, refused permanently, expired, unknown,
//! pending or not ours. The vendor's side is its recorded answers.

use super::joint::{Audit, Joint, VENDOR};
use super::step::{self, Item, Step};
use crate::ledger::LedgerBooks;

/// The ledger's own checks that belong to this joint.
const KINDS: [&str; 2] = ["usage_without_publication", "publication_without_its_answer"];

pub(super) fn compare(books: &LedgerBooks) -> Joint {
    let mut joint = Joint::new(VENDOR);
    joint.number("accepted_usage", books.usage);
    for (state, count) in &books.publications {
        joint.number(state.clone(), *count);
    }
    joint.differences = books
        .differences
        .iter()
        .filter(|difference| KINDS.contains(&&*difference.kind))
        .cloned()
        .collect();
    joint
}

/// One step of the continuous audit.
pub(super) async fn step(
    audit: &Audit,
    known: Vec<Item>,
    _progress: Option<serde_json::Value>,
) -> anyhow::Result<Step> {
    Ok(step::whole(&audit.ledger_joints().await?.vendor, &known))
}

pub(super) fn is_vendor_kind(kind: &str) -> bool {
    KINDS.contains(&kind)
}
