//! Recovery after a loss of topics, of the ledger or of coderd's database, with real processes on real servers.

mod again;
mod at_once;
mod away;
mod coderd;
mod kafka;
mod ledger;
mod scraped;
mod servers;
mod standby;
mod without;
mod world;
