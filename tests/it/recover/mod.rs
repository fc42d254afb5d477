//! Recovery after a loss of topics, of the ledger or of coderd's database, with real processes on
//! real servers.

mod coderd;
mod concurrent;
mod excluded_sources;
mod late_broker;
mod ledger;
mod log;
mod repeated;
mod scraped;
mod servers;
mod standby;
mod world;
