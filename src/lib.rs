//! Tallyline meters Coder deployments: typed events on a log, folded into metrics, license counts and billed usage, with books that
//! balance. ARCHITECTURE.md draws the flow; `tests/arrows.rs` holds which part may name which.

pub mod api;
pub mod audit;
pub mod cause;
pub mod cli;
pub mod clock;
pub mod coderd;
pub mod collectors;
pub mod config;
pub mod consumer;
pub mod event;
pub mod export;
pub mod ledger;
pub mod license;
pub mod log;
pub mod metrics;
pub mod operations;
pub mod projection;
pub mod publisher;
pub mod sim;
pub mod stages;
pub mod status;
pub mod tallyman;
pub mod waiting;
