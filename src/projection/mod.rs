//! Drives a fold along the ledger. It starts from a snapshot or from zero, follows new batches,
//! shows its state and saves snapshots.

mod error;
mod folded;
mod follow;
mod progress;
mod save;
mod view;

pub use error::ProjectionError;
pub use folded::Folded;
pub use follow::{
    Projection, ProjectionSettings, fold_as_rebuilt, fold_on, fold_to, fold_to_with_progress,
};
pub use view::{DeploymentFamilies, Freshness, View, families};
