//! The integration tests, one binary (linking is what costs time). They need the servers that `scripts/test` starts.

mod audit;
mod cli;
mod coderd_sim;
mod collector;
mod export;
mod journey;
mod leases;
mod ledger;
mod log_contract;
mod operate;
mod oracle;
mod passes;
mod projection;
mod publisher;
mod recover;
mod serve;
mod smoke;
mod support;
mod vanished;
