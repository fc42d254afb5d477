//! The request for a rebuild.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::license::MAX_TOKEN_BYTES;
use crate::operations::{OperationError, given_file, instant, optional_instant};
use crate::stages::{LicensesState, MetricsState, Stage as _};

/// The stage to fold.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum RebuildStage {
    /// The domain series of /metrics
    Metrics,
    /// Licenses and managed agents
    Licenses,
}

impl RebuildStage {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RebuildStage::Metrics => MetricsState::NAME,
            RebuildStage::Licenses => LicensesState::NAME,
        }
    }
}

/// Fold a stage again from zero and show the differences from the shown state; writes nothing.
///
/// With rules, a candidate or omitted licenses, it is a rehearsal: it shows their effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct RebuildRequest {
    /// Stage to fold.
    pub stage: RebuildStage,
    /// License rules to rehearse, 2025-07 or 2026-02; only for licenses.
    #[arg(long, value_name = "NAME")]
    #[serde(default)]
    pub rules: Option<String>,
    /// Candidate license that coderd does not have yet; only for licenses.
    #[arg(long, value_name = "FILE", value_parser = license_in)]
    #[serde(default)]
    pub license: Option<LicenseToken>,
    /// coderd's ids of licenses to omit; only for licenses.
    #[arg(long, value_name = "LICENSE_ID")]
    #[serde(default)]
    pub without: Vec<i32>,
    /// Deployment of the licenses. Default: the pipeline's deployment, or all deployments if only
    /// the rules differ.
    #[arg(long, value_name = "DEPLOYMENT_ID")]
    #[serde(default)]
    pub source: Option<Uuid>,
    /// Instant for which entitlements are rehearsed. Default: now.
    #[arg(long, value_name = "INSTANT", value_parser = instant)]
    #[serde(default, deserialize_with = "optional_instant")]
    pub at: Option<DateTime<Utc>>,
}

/// The token of a license. It is never printed or stored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct LicenseToken(pub String);

impl fmt::Debug for LicenseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Reads the token in this file.
fn license_in(path: &str) -> Result<LicenseToken, String> {
    // a line feed may follow the token
    given_file::text(path.as_ref(), MAX_TOKEN_BYTES + 1).map(LicenseToken)
}

impl RebuildRequest {
    /// Whether this is a rehearsal. Only a rehearsal may name a deployment and an instant: a plain
    /// rebuild folds all deployments, as of now.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] for a field that would be ignored.
    pub(super) fn rehearses(&self) -> Result<bool, OperationError> {
        let rehearses = self.rules.is_some() || self.license.is_some() || !self.without.is_empty();
        let invalid = |field, message: &str| {
            Err(OperationError::Invalid { field, message: message.to_owned() })
        };
        match (self.stage, rehearses) {
            (RebuildStage::Metrics, true) => invalid(
                "stage",
                "metrics have no rules and no licenses to rehearse: `rebuild plan licenses`",
            ),
            (_, false) if self.source.is_some() => invalid(
                "source",
                "--source is only for a rehearsal, with --rules, --license or --without: without one every deployment is folded",
            ),
            (_, false) if self.at.is_some() => invalid(
                "at",
                "--at is only for a rehearsal, with --rules, --license or --without: without one all is folded as it is now",
            ),
            (_, rehearses) => Ok(rehearses),
        }
    }
}
