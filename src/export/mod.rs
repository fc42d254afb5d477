//! Usage files for finance: the same range as of the same ledger sequence gives the same bytes.

mod csv;
mod file;
mod usage;

pub use file::{ExportFile, Hashed, part_path};
pub use usage::{Totals, TypeTotal, export_usage};
