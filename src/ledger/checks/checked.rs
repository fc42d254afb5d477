//! What the checks of one page found.

use std::collections::BTreeMap;

use super::chains::{ChainName, ChainSums};
use super::page::BatchCursor;
use crate::ledger::Difference;

/// What the checks of one page found.
#[derive(Clone, Debug)]
pub struct CheckedPage {
    pub until: BatchCursor,
    pub is_last: bool,
    /// Sums of the page's batches, by chain; for the joint of log and ledger.
    pub chains: BTreeMap<ChainName, ChainSums>,
    /// Accepted usage of the page; for the joint of ledger and vendor.
    pub usage: i64,
    pub differences: Vec<Difference>,
}
