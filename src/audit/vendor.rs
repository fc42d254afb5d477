//! Compares ledger and vendor. Accepted usage is published, refused permanently, expired, unknown,
//! pending, not ours or withdrawn. The vendor's side is its recorded answers.

use super::joint::{Audit, Joint, VENDOR};
use super::step::{Item, Step};
use super::turn::Pace;
use super::turns::{self, LedgerProgress};
use crate::ledger::LedgerBooks;
use crate::ledger::checks::{self, CheckRequest};

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
    progress: Option<serde_json::Value>,
    pace: &Pace,
) -> anyhow::Result<Step> {
    let mut progress = LedgerProgress::of(progress);
    let request = CheckRequest { audited: progress.audited, keys: None, known: &known };
    let checked = audit.ledger.run(async |conn| checks::vendor_joint(conn, &request).await).await?;
    let behind = !checked.new.is_last;
    let mut found = progress.advance(&checked.new);
    found.extend(checked.known);
    if !behind {
        found.extend(progress.take_turns(audit, VENDOR, pace).await?);
    }
    let step = turns::step(audit, VENDOR, known, found, &progress, |_| false).await?;
    Ok(Step { behind, ..step })
}

pub(super) fn is_vendor_kind(kind: &str) -> bool {
    KINDS.contains(&kind)
}
