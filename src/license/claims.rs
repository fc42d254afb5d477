//! The claims of a license, and what they are worth at an instant.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

/// The longest term that coderd accepts, counted from now to `license_expires`.
const LONGEST_TERM: TimeDelta = TimeDelta::days(5 * 365);

/// The claims of one verified license. This is the form that the ledger keeps: its JSON names do not change, and times are RFC 3339
/// in UTC, in whole microseconds.
///
/// Issuer, audience and subject are left out: coderd does not check them either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LicenseClaims {
    /// `iat`
    pub issued_at: DateTime<Utc>,
    /// `nbf`: the start of the usage period, which it includes.
    pub not_before: DateTime<Utc>,
    /// `license_expires`: the end of the paid term and the start of grace.
    pub license_expires: DateTime<Utc>,
    /// `exp`: the end of grace and of the usage period, which it does not include.
    pub expires_at: DateTime<Utc>,
    /// `jti`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_id: Option<String>,
    /// For example `salesforce`.
    pub account_type: String,
    /// The customer's account with the vendor.
    pub account_id: String,
    /// The deployments for which the license was issued; empty for any. Checked by whoever takes the license in, not by the parser.
    #[serde(default)]
    pub deployment_ids: Vec<String>,
    /// A trial license.
    #[serde(default)]
    pub trial: bool,
    /// As written in the token: empty, `enterprise`, `premium`, or something newer.
    #[serde(default)]
    pub feature_set: String,
    /// The older way to say `enterprise`; without meaning beside a feature set.
    #[serde(default)]
    pub all_features: bool,
    /// Feature name to value, as written: negative values and unknown names too.
    #[serde(default)]
    pub features: BTreeMap<String, i64>,
    /// Addons such as AI governance.
    #[serde(default)]
    pub addons: Vec<String>,
    /// The deployment must send telemetry.
    #[serde(default)]
    pub require_telemetry: bool,
    /// The deployment must publish its usage.
    #[serde(default)]
    pub publish_usage_data: bool,
}

/// Which set of features a license grants as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureSet {
    /// Only the features named one by one; an unknown set means the same, as in coderd.
    None,
    /// `enterprise`, or `all_features` without a set.
    Enterprise,
    /// `premium`
    Premium,
}

/// What a license is worth at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// `nbf` or `iat` lies ahead.
    NotYetValid,
    /// Within the paid term.
    Valid,
    /// The paid term is over, the token is not.
    InGrace,
    /// `exp` is reached.
    Expired,
    /// `license_expires` lies more than five years of 365 days ahead: coderd refuses such a license for as long as this is so.
    TermTooLong,
}

impl Validity {
    /// Whether the license counts: within its paid term or in grace.
    #[must_use]
    pub fn counts(self) -> bool {
        matches!(self, Validity::Valid | Validity::InGrace)
    }
}

impl LicenseClaims {
    /// What the license is worth at `now`. The token is good from `nbf` on until just before `exp`; grace begins just after
    /// `license_expires`.
    #[must_use]
    pub fn validity(&self, now: DateTime<Utc>) -> Validity {
        if self.license_expires - now > LONGEST_TERM {
            Validity::TermTooLong
        } else if now >= self.expires_at {
            Validity::Expired
        } else if now < self.not_before || now < self.issued_at {
            Validity::NotYetValid
        } else if now > self.license_expires {
            Validity::InGrace
        } else {
            Validity::Valid
        }
    }

    /// The feature set that holds, the older flag taken into account.
    #[must_use]
    pub fn feature_set(&self) -> FeatureSet {
        match (self.feature_set.as_str(), self.all_features) {
            ("premium", _) => FeatureSet::Premium,
            ("enterprise", _) | ("", true) => FeatureSet::Enterprise,
            _ => FeatureSet::None,
        }
    }
}
