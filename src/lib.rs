//! Tallyline meters Coder deployments. It folds typed events on a log into metrics, license counts
//! and billed usage, with an audit that balances. ARCHITECTURE.md shows the flow; `tests/arrows.rs`
//! checks which part may name which.
//!
//! In parts that read external times, numbers and sizes, clippy denies arithmetic that can
//! overflow.

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
pub mod pauses;
pub mod pool;
pub mod projection;
pub mod publisher;
pub mod retry;
mod sentences;
pub mod stages;
pub mod status;
#[cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]
pub mod tallyman;
pub mod words;
