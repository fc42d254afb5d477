//! Drives a fold along the ledger. It starts from a snapshot or from zero, follows new batches, shows its state and saves snapshots.

mod error;
mod fold;
mod follow;
mod shown;
mod view;

pub use error::ProjectionError;
pub use fold::{Folded, fold_on, fold_to, fold_to_telling};
pub use follow::{Projection, ProjectionSettings};
pub use shown::{ShownFamilies, families};
pub use view::{Standing, View};
