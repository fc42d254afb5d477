//! Reads coderd's database: one read-only connection and its row types. It names no other part of
//! Tallyline.
//!
//! [`Database`] is the address; [`Database::connect`] opens a [`Reader`]. Each of its methods is
//! beside its SQL. [`Catalog`] is what this version of coderd has, [`Horizon`] which commits can be
//! missing.

mod baseline;
mod build_names;
mod builds;
mod catalog;
mod connect;
mod error;
mod functions;
mod horizon;
mod identity;
mod licenses;
mod publish_marks;
mod slices;
mod time;
mod usage;
mod usage_days;

pub use baseline::CreationsRow;
pub use builds::{BuildKey, BuildRow, RangeMark};
pub use catalog::Catalog;
pub use connect::{Database, Reader};
pub use error::CoderdError;
pub use functions::grants;
pub use horizon::Horizon;
pub use identity::{Identity, IdentityFacts};
pub use licenses::LicenseRow;
pub use publish_marks::UsageRow;
pub use slices::{BuildSlice, UsagePage};
pub use time::Time;
pub use usage::UsageKey;
