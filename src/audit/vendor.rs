//! Compares ledger and vendor. Accepted usage is published, refused permanently, expired, unknown,
//! pending, not ours or withdrawn. The vendor's side is its recorded answers.

use super::joint::{Audit, Joint, VENDOR};
use super::step::{Item, Step};
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
) -> anyhow::Result<Step> {
    let mut progress = LedgerProgress::of(progress);
    progress.begin_turns(audit).await?;
    let request = CheckRequest {
        audited: progress.audited,
        slices: progress.slices(),
        keys: progress.keys(),
        known: &known,
    };
    let checked = audit.ledger.run(async |conn| checks::vendor_joint(conn, &request).await).await?;
    let mut found = progress.advance(&checked, audit.ledger.clock.now());
    found.extend(checked.known);
    let step = turns::step(audit, VENDOR, known, found, &progress, |_| false).await?;
    Ok(Step { behind: !checked.new.is_last, ..step })
}

pub(super) fn is_vendor_kind(kind: &str) -> bool {
    KINDS.contains(&kind)
}
