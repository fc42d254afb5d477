//! Collectors: read coderd's database and append events to the log.
//!
//! A pass reads the horizon, then the rows that can be new. It appends those that neither the log
//! nor the ledger has. After the log acknowledges them, it records the pass with its offsets and
//! the instant until which it is complete.

mod bounds;
pub mod events;
mod identity;
mod late_rows;
mod lease;
mod licenses;
mod open;
mod pass;
mod proof;
mod ranges;
mod recent;
mod report;
mod run;
mod runtime;
mod seen_ids;
mod settings;
mod signature_check;
mod status;
mod take;
mod telemetry;

pub use open::Collector;
pub use report::PassReport;
pub use run::run;
pub use settings::{CollectError, Settings};
pub use status::CollectorStatus;
pub use telemetry::CollectorTelemetry;
