//! The log in PostgreSQL: tables, a group's leases, retention.

mod append;
mod consumer;
mod leases;
mod retention;
mod tables;

pub use tables::{PostgresLog, PostgresLogSettings};
