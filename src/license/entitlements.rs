//! The shape of `GET /api/v2/entitlements`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The name of the managed agents' feature.
pub const MANAGED_AGENT_LIMIT: &str = "managed_agent_limit";

/// What coderd answers under `GET /api/v2/entitlements`; of its features only those that Tallyline counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Entitlements {
    /// Feature name to what is known of it.
    pub features: BTreeMap<String, Feature>,
    /// For administrators to act on.
    pub warnings: Vec<String>,
    /// Licenses, or parts of them, that were refused.
    pub errors: Vec<String>,
    /// There is at least one license that counts.
    pub has_license: bool,
    /// The last license that counts is a trial.
    pub trial: bool,
    /// A license that counts requires telemetry.
    pub require_telemetry: bool,
    /// The instant for which this holds.
    pub refreshed_at: DateTime<Utc>,
}

/// How a feature is granted. The order is the rank: entitled is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Entitlement {
    /// No license grants it.
    NotEntitled,
    /// The paid term is over, the license is not.
    GracePeriod,
    /// Granted.
    Entitled,
}

/// One feature. Absent values are left out of the JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Feature {
    /// How it is granted.
    pub entitlement: Entitlement,
    /// Granted and not switched off by a limit of 0.
    pub enabled: bool,
    /// The limit that counts; under rule set 2025-07 the hard one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    /// The soft limit; only under rule set 2025-07.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<i64>,
    /// What was used within the usage period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual: Option<i64>,
    /// The period over which usage is counted: half-open, start included, end not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage_period: Option<UsagePeriod>,
}

/// The period over which a license's usage is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UsagePeriod {
    /// `iat` of the license.
    pub issued_at: DateTime<Utc>,
    /// `nbf` of the license, included.
    pub start: DateTime<Utc>,
    /// `exp` of the license, not included: grace lies inside.
    pub end: DateTime<Utc>,
}

impl Feature {
    /// A feature that no license grants: nothing about it is known.
    #[must_use]
    pub fn not_entitled() -> Self {
        Feature { entitlement: Entitlement::NotEntitled, enabled: false, limit: None, soft_limit: None, actual: None, usage_period: None }
    }
}

impl Entitlements {
    /// The managed agents' feature.
    ///
    /// # Panics
    /// Never for a value made by [`entitlements`](super::entitlements), which always sets the feature.
    #[must_use]
    pub fn managed_agents(&self) -> &Feature {
        &self.features[MANAGED_AGENT_LIMIT]
    }
}
