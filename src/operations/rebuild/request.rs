//! What is asked of a rebuild.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::operations::OperationError;
use crate::stages::{LicensesState, MetricsState, Stage as _};

/// Which fold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RebuildStage {
    /// The domain series of /metrics
    Metrics,
    /// Licenses and managed agents
    Licenses,
}

impl RebuildStage {
    /// The stage's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RebuildStage::Metrics => MetricsState::NAME,
            RebuildStage::Licenses => LicensesState::NAME,
        }
    }
}

/// What to fold again. With rules, a license or a license less it is a rehearsal: the answer is what would be shown then. Nothing is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RebuildRequest {
    /// The fold.
    pub stage: RebuildStage,
    /// The name of the license rules to rehearse; only for the licenses.
    #[serde(default)]
    pub rules: Option<String>,
    /// A candidate license, which coderd does not have yet; only for the licenses.
    #[serde(default)]
    pub license: Option<LicenseToken>,
    /// coderd's ids of licenses to leave out; only for the licenses.
    #[serde(default)]
    pub without: Vec<i32>,
    /// The deployment whose licenses are meant; without it, the pipeline's, or all where only the rules are another.
    #[serde(default)]
    pub source: Option<Uuid>,
    /// The instant for which entitlements are rehearsed; without it, now.
    #[serde(default)]
    pub at: Option<DateTime<Utc>>,
}

/// A license's token. It is never printed and never kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct LicenseToken(pub String);

impl fmt::Debug for LicenseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl RebuildRequest {
    /// Whether it is a rehearsal. Deployment and instant belong to one: a plain rebuild folds every deployment, as it is now.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] for what would be passed over.
    pub(super) fn rehearses(&self) -> Result<bool, OperationError> {
        let rehearses = self.rules.is_some() || self.license.is_some() || !self.without.is_empty();
        let invalid = |field, message: &str| Err(OperationError::Invalid { field, message: message.to_owned() });
        match (self.stage, rehearses) {
            (RebuildStage::Metrics, true) => invalid("stage", "metrics have no rules and no licenses to rehearse: `rebuild plan licenses`"),
            (_, false) if self.source.is_some() => invalid(
                "source",
                "--source is only for a rehearsal, with --rules, --license or --without: without one every deployment is folded",
            ),
            (_, false) if self.at.is_some() => {
                invalid("at", "--at is only for a rehearsal, with --rules, --license or --without: without one all is folded as it is now")
            }
            (_, rehearses) => Ok(rehearses),
        }
    }
}
