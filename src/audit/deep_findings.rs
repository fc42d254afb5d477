//! The differences of a deep audit.

use super::joint::Joint;
use crate::ledger::Difference;

/// The most differences in the list; their number covers all.
const LISTED: usize = 1_000;

/// Differences until now.
pub(super) struct DeepFindings {
    pub(super) joint: Joint,
    pub(super) differences: usize,
}

impl DeepFindings {
    pub(super) fn push(&mut self, difference: Difference) {
        self.differences += 1;
        if self.joint.differences.len() < LISTED {
            self.joint.differences.push(difference);
        }
    }

    pub(super) fn differs(
        &mut self,
        kind: &'static str,
        id: impl Into<String>,
        detail: impl Into<String>,
    ) {
        self.push(Difference { kind: kind.into(), id: id.into(), detail: detail.into() });
    }
}
