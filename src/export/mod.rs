//! Usage files for finance: the same range as of the same ledger sequence gives the same bytes.

mod complete;
mod csv;
mod file;
mod usage;

pub use complete::{incomplete, incomplete_as_of};
pub use file::{ExportFile, Hashed, is_stdout};
pub use usage::{Aggregate, Totals, TypeTotal, export_usage};
