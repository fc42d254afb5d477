//! The integration tests in one binary, because linking takes the time. They need the servers that
//! `scripts/test` starts.

mod audit;
mod audit_cost;
mod bad_input;
mod cli;
mod cli_database;
mod coderd_sim;
mod collector;
mod deep_audit;
mod explain;
mod export;
mod export_command;
mod identity;
mod install;
mod journey;
mod known_failures;
mod leases;
mod ledger;
mod ledger_rights;
mod log_contract;
mod million;
mod operate;
mod oracle;
mod passes;
mod projection;
mod provenance;
mod publisher;
mod purge;
mod rebuild;
mod recover;
mod rejects;
mod replay;
mod serve;
mod silence;
mod smoke;
mod support;
