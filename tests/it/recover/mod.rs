//! Bringing everything back after a loss, with real processes on real servers: topics, the ledger, coderd's database.

mod at_once;
mod coderd;
mod first_look;
mod kafka;
mod ledger;
mod scraped;
mod without;
mod world;
