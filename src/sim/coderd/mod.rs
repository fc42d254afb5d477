//! Lives in coderd's tables as coderd does and keeps its own truth.
//!
//! Everything is planned from a seed (`lives`, `builds`, `heartbeats`, `licenses`) as acts, one transaction of coderd each (`acts`).
//! [`Simulation`] does them in order: the books note what each makes true (`books`, [`truth`]), `write` writes the rows.
//!
//! Where it departs from life, on purpose: in the schema without Tasks AI templates go on making `dc_managed_agents_v1` rows by the
//! resource rule, which coderd no longer does, so that there is usage to meter; `hb_ai_seats_v1` rows are written although coderd's
//! job never ran; jobs have no heartbeats; the runtime generator starts with the history instead of filling seven idle days before it.

mod acts;
mod books;
mod builds;
mod chance;
mod config;
mod deployment;
mod furnish;
mod heartbeats;
mod licenses;
mod lives;
mod options;
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
