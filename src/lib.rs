//! Tallyline meters Coder deployments: typed events on a log, folded into metrics, license counts and billed usage, with books that
//! balance. ARCHITECTURE.md draws the flow; `tests/arrows.rs` holds which part may name which.
//!
//! Times, numbers and sizes in the parts at the edge come from outside: clippy denies arithmetic there that can overflow.

pub mod api;
pub mod audit;
pub mod cause;
pub mod cli;
pub mod clock;
#[cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]
pub mod coderd;
#[cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]
pub mod collectors;
pub mod config;
pub mod consumer;
#[cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]
pub mod event;
pub mod export;
pub mod ledger;
#[cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]
pub mod license;
pub mod log;
pub mod metrics;
pub mod operations;
pub mod projection;
pub mod publisher;
pub mod sim;
pub mod stages;
pub mod status;
#[cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]
pub mod tallyman;
pub mod waiting;
pub mod words;
