//! The integration tests, one binary (linking is what costs time). They need the servers that `scripts/test` starts.

mod audit;
mod bad_input;
mod cli;
mod coderd_sim;
mod collector;
mod deep_audit;
mod export;
mod journey;
mod known_failures;
mod leases;
mod ledger;
mod log_contract;
mod million;
mod operate;
mod oracle;
mod passes;
mod projection;
mod prove;
mod publisher;
mod recover;
mod rejects;
mod serve;
mod smoke;
mod support;
mod vanished;
