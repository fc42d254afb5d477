//! Collectors: coderd's database (later also HTTP and NDJSON) into the log.
//!
//! A pass reads the horizon first, then what can be new, and appends what neither the log nor the ledger has yet. When the log has
//! acknowledged all of it, the pass is recorded with the offsets that carry it and the instant until which it is complete.

pub mod events;
mod identity;
mod lease;
mod licenses;
mod missed;
mod open;
mod pass;
mod run;
mod runtime;
mod seen;
mod settings;
mod signed;
mod take;
mod telemetry;

pub use open::Collector;
pub use pass::PassReport;
pub use run::{Standing, run};
pub use settings::{CollectError, Settings};
pub use telemetry::CollectorTelemetry;
