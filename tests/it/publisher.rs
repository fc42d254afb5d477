//! The publisher between a real ledger, coderd's tables and the simulated vendor, on a given clock.

mod books;
mod expiry;
mod frozen;
mod holds;
mod identity;
mod modes;
mod requests;
mod restored;
mod overrides;
mod takeover;
mod verdicts;
pub mod world;
