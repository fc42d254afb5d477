//! Writes to coderd's tables as coderd does, and keeps its own truth.
//!
//! `lives`, `builds`, `heartbeats` and `licenses` plan everything from a seed as acts, one
//! transaction of coderd each (`acts`). [`Simulation`] does them in order: `books` notes their
//! effects ([`truth`]), and `write` writes the rows.
//!
//! Deliberate differences from coderd. Without Tasks, AI templates still create
//! `dc_managed_agents_v1` rows by the resource rule, so that there is usage. `hb_ai_seats_v1` rows
//! are written although coderd's job never ran; jobs have no heartbeats. The runtime generator
//! starts with the history; coderd would fill seven idle days before it.

mod acts;
mod base_rows;
mod books;
mod builds;
mod chance;
mod config;
mod deployment;
mod heartbeats;
mod licenses;
mod lives;
mod options;
mod planning;
mod purge;
mod renames;
mod schema;
mod script;
mod signing;
mod simulation;
pub mod truth;
mod write;

pub use config::{Config, PREBUILDS_USER};
pub use deployment::Deployment;
pub use options::{Options, live, run};
pub use purge::{Purge, SEARCH_PATH_BEFORE_PURGES};
pub use schema::{SchemaVersion, create as create_schema};
pub use signing::{LicenseKey, Signer};
pub use simulation::Simulation;
pub use truth::Truth;
