//! `tallyline-demo tallyman-sim`: a simulated Tallyman. It answers by coderd's own reference for
//! the service, and misbehaves on request. It keeps its bills and every delivery's bytes.
//!
//! It shares no code with Tallyline's own client, so that an error in one cannot hide an error in
//! the other.

mod books;
mod command;
mod connection;
mod ingest;
mod server;
mod state;
mod switches;
mod wire;

pub use books::{Billed, Books, Delivery, Outcome};
pub use command::{Options, run};
pub use server::{Config, Tallyman};
pub use switches::{Behaviour, CutMoment, Cuts, EventRule, Poison, ServerErrors, Switches};
