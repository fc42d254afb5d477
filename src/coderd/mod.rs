//! The read side of coderd's database: one read-only connection, its own row shapes, nothing of ours.
//!
//! [`Database`] says where it is; [`Database::connect`] gives a [`Reader`], whose methods stand beside their SQL: [`Catalog`] (what this
//! version of coderd has), [`Horizon`] (which commits can be missing), builds, usage, licenses.

mod baseline;
mod builds;
mod catalog;
mod connect;
mod error;
mod functions;
mod horizon;
mod identity;
mod licenses;
mod publish;
mod time;
mod usage;
mod usage_days;

pub use baseline::CreationsRow;
pub use builds::{BuildKey, BuildRow};
pub use catalog::Catalog;
pub use connect::{Database, Reader};
pub use error::CoderdError;
pub use functions::grants;
pub use horizon::Horizon;
pub use identity::{Identity, IdentityFacts};
pub use licenses::LicenseRow;
pub use publish::UsageRow;
pub use time::Time;
pub use usage::UsageKey;
