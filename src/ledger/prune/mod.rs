//! Retention: removes rows past their days, in small transactions, and counts them.
//!
//! Each removal adds to the counts of its kind in its own transaction. An act `prune` takes the
//! counts over in its transaction. So a crash loses no count: what was removed is the sum over all
//! acts and the counts since.
//!
//! Digests remain of what a batch's chain covers, so that `audit --deep` still verifies the batch.
//! Rows of a batch that does not match its digest stay: they are evidence.
//! Events, batches, settlements, publications, acts, licenses and exports are never removed.

mod attempts;
mod counts;
mod evidence;
mod kinds;
mod plans;
mod rejects;
mod removal;
mod snapshots;

pub use counts::{PruneState, Removed, RemovedPage, count_in_act, finish_round, states};
pub use kinds::{Due, DuePage, LEASE, PruneKind, PrunePlace, Retention, transactions};
pub use removal::{due, remove};
