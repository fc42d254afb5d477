//! Bringing everything back after a loss, with real processes on real servers: topics, the ledger, coderd's database.

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
