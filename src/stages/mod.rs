//! Pure folds over the ledger: `state × fact → state`. No ledger, no clock, no I/O, so that every process that has folded up to the same
//! sequence holds the same state.

mod agents;
mod effects;
mod licenses;
mod metrics;

#[cfg(test)]
mod samples;

pub use agents::AgentCounts;
pub use effects::{Effect, Effects, LeftOut, WhyNot, effects_of};
pub use licenses::{DeploymentLicenses, KnownLicense, LicensesState};
pub use metrics::{CLAIM_SECONDS, CREATION_SECONDS, CREATIONS, DeploymentMetrics, MetricsState, NEGATIVE_DURATIONS};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::event::Fact;

/// A fold along the ledger. Its default is the state of the empty ledger; its JSON is what a snapshot holds, and comes back equal.
pub trait Stage: Default + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The name under which snapshots are kept.
    const NAME: &'static str;
    /// Raised with each change of what a fact adds or of the state's form: then the fold begins again from zero.
    const RULES_VERSION: i32;

    /// What one fact adds. To be called in ledger order, each fact once.
    ///
    /// # Errors
    /// [`Broken`]: the facts are not those of a ledger. Nothing of this fact was added; whoever folds must not go on.
    fn apply(&mut self, fact: &Fact) -> Result<(), Broken>;
}

/// A promise of the ledger that the facts do not keep. Source: the ledger writes a source's introduction, once, before anything else of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Something of a deployment that was not introduced before it.
    #[error("deployment {0} has a fact before its introduction")]
    NotIntroduced(Uuid),
    /// A deployment is introduced again.
    #[error("deployment {0} is introduced a second time")]
    IntroducedTwice(Uuid),
    /// This version cannot read a license's claims.
    #[error("the claims of license {license_id}: {problem}")]
    Claims { license_id: i32, problem: String },
}
