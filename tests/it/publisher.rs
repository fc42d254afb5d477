//! The publisher between a real ledger, coderd's tables and the simulated vendor, on a given clock.

mod books;
mod expiry;
mod frozen;
mod holds;
mod identity;
mod lanes;
mod late_audits;
mod modes;
mod overrides;
mod poison;
pub mod requests;
mod restored;
mod takeover;
mod verdicts;
pub mod world;
