//! `tallyline tallyman-sim`: a simulated Tallyman that answers as coderd's own reference for the service says, misbehaves on
//! request, and keeps what it billed and every delivery's bytes.
//!
//! It shares no code with Tallyline's own client, so that an error in the one cannot hide an error in the other.

mod books;
mod command;
mod connection;
mod ingest;
mod server;
mod switches;
mod wire;

pub use books::{Billed, Books, Delivery, Outcome};
pub use command::{Options, run};
pub use server::{Config, Tallyman};
pub use switches::{Behaviour, CutMoment, Cuts, EventRule, ServerErrors, Switches};
