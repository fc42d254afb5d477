//! Drives a fold along the ledger. It starts from a snapshot or from zero, follows new batches,
//! shows its state and saves snapshots.

mod error;
mod families;
mod fold;
mod follow;
mod view;

pub use error::ProjectionError;
pub use families::{DeploymentFamilies, families};
pub use fold::{Folded, fold_on, fold_to, fold_to_with_progress};
pub use follow::{Projection, ProjectionSettings};
pub use view::{Freshness, View};
