//! Recovery after a loss of topics, of the ledger or of coderd's database, with real processes on real servers.

mod repeated;
mod concurrent;
mod late_broker;
mod coderd;
mod kafka;
mod ledger;
mod scraped;
mod servers;
mod standby;
mod excluded_sources;
mod world;
