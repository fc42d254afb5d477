//! The publisher between a real ledger, coderd's tables and the simulated vendor, on a given clock.

mod books;
mod expiry;
mod modes;
mod requests;
mod verdicts;
pub mod world;
