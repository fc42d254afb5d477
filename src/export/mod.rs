//! Exports of usage for finance. The same range at the same ledger sequence always gives the same
//! bytes.

mod complete;
mod csv;
mod file;
mod usage;

pub use complete::{incomplete, incomplete_as_of};
pub use file::{ExportFile, Hashed, is_stdout};
pub use usage::{Aggregate, Totals, TypeTotal, export_usage};
