//! Pure folds over the ledger: `state × fact → state`. No ledger, no clock, no I/O, so all
//! processes have the same state at the same sequence.

mod agents;
mod licenses;
mod metrics;

#[cfg(test)]
mod samples;

pub use agents::AgentCounts;
pub use licenses::{DeploymentLicenses, KnownLicense, LicensesState};
pub use metrics::{
    CLAIM_SECONDS, CREATION_SECONDS, CREATIONS, DeploymentMetrics, Effect, Effects, MetricsState,
    NEGATIVE_DURATIONS, NoEffectReason, UnaffectedFamily, effects_of,
};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::event::Fact;

/// A fold along the ledger. The default is the state of an empty ledger. A snapshot contains its
/// JSON, which gives an equal state.
pub trait Stage: Default + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The name of its snapshots.
    const NAME: &'static str;
    /// Increased with each change of a fact's effect or of the state's form. The fold then restarts
    /// from zero.
    const RULES_VERSION: i32;
    /// Whether a correction changes the state only at a rebuild. Such a stage ignores
    /// [`Fact::Corrected`], and its fold reads events as corrected up to its newest rebuild.
    const CORRECTED_BY_REBUILD: bool = false;

    /// Applies one fact. Must be called once per fact, in ledger order.
    ///
    /// # Errors
    /// [`LedgerFault`] if the facts violate the ledger's invariants. Then nothing of this fact was
    /// applied, and the caller must stop the fold.
    fn apply(&mut self, fact: &Fact) -> Result<(), LedgerFault>;
}

/// A violated invariant of the ledger. The ledger writes a source's introduction once, before any
/// other fact of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerFault {
    /// A fact of a deployment that was not introduced before.
    #[error("deployment {0} has a fact before its introduction")]
    NotIntroduced(Uuid),
    /// A second introduction of a deployment.
    #[error("deployment {0} was introduced twice")]
    IntroducedTwice(Uuid),
    /// This version cannot read a license's claims.
    #[error("the claims of license {license_id} are not readable: {problem}")]
    Claims { license_id: i32, problem: String },
    /// A correction of an event that was not applied before.
    #[error("deployment {0} has a correction of an event that is not counted")]
    NotCounted(Uuid),
}
