//! The answer of `GET /api/v2/entitlements`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Feature name of managed agents.
pub const MANAGED_AGENT_LIMIT: &str = "managed_agent_limit";

/// coderd's answer to `GET /api/v2/entitlements`, with only the features that Tallyline counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Entitlements {
    /// Features by name.
    pub features: BTreeMap<String, Feature>,
    /// Warnings for administrators.
    pub warnings: Vec<String>,
    /// Refused licenses, or refused parts of them.
    pub errors: Vec<String>,
    /// Whether at least one license is effective.
    pub has_license: bool,
    /// Whether the last effective license is a trial.
    pub trial: bool,
    /// Whether an effective license requires telemetry.
    pub require_telemetry: bool,
    /// Instant of this answer.
    pub refreshed_at: DateTime<Utc>,
}

/// How a feature is granted. The order is the rank; entitled is the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Entitlement {
    /// Not granted by any license.
    NotEntitled,
    /// Granted by a license whose paid term has ended but that has not expired.
    GracePeriod,
    /// Granted by a license in its paid term.
    Entitled,
}

/// One feature. The JSON omits absent values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Feature {
    /// How the feature is granted.
    pub entitlement: Entitlement,
    /// Whether the feature is granted and not disabled by a limit of 0.
    pub enabled: bool,
    /// Effective limit; under rule set 2025-07 the hard limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    /// Soft limit; only under rule set 2025-07.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<i64>,
    /// Usage in the usage period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual: Option<i64>,
    /// Period of the counted usage: half-open, start included, end not included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage_period: Option<UsagePeriod>,
}

/// The period in which a license's usage is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UsagePeriod {
    /// `iat` of the license.
    pub issued_at: DateTime<Utc>,
    /// `nbf` of the license, included.
    pub start: DateTime<Utc>,
    /// `exp` of the license, not included. The grace period is part of the period.
    pub end: DateTime<Utc>,
}

impl Feature {
    /// A feature that no license grants, without values.
    #[must_use]
    pub fn not_entitled() -> Self {
        Feature {
            entitlement: Entitlement::NotEntitled,
            enabled: false,
            limit: None,
            soft_limit: None,
            actual: None,
            usage_period: None,
        }
    }
}

impl Entitlements {
    /// The feature of managed agents.
    ///
    /// # Panics
    /// Never for a value of [`entitlements`](super::entitlements), which always sets the feature.
    #[must_use]
    pub fn managed_agents(&self) -> &Feature {
        &self.features[MANAGED_AGENT_LIMIT]
    }
}
