//! Claims of a license, and its validity at an instant.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The longest term that coderd accepts, from now to `license_expires`.
const LONGEST_TERM: TimeDelta = TimeDelta::days(5 * 365);

/// The claims of one verified license. The ledger stores this JSON form: its names never change,
/// and times are RFC 3339 in UTC, in whole microseconds.
///
/// Issuer, audience and subject are omitted, because coderd does not check them either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LicenseClaims {
    /// `iat`
    pub issued_at: DateTime<Utc>,
    /// `nbf`: start of the usage period, included.
    pub not_before: DateTime<Utc>,
    /// `license_expires`: end of the paid term and start of the grace period.
    pub license_expires: DateTime<Utc>,
    /// `exp`: end of the grace period and of the usage period, not included.
    pub expires_at: DateTime<Utc>,
    /// `jti`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_id: Option<String>,
    /// For example `salesforce`.
    pub account_type: String,
    /// The customer's account at the vendor.
    pub account_id: String,
    /// The deployments of the license; empty for any. See [`LicenseClaims::is_for`].
    #[serde(default)]
    pub deployment_ids: Vec<String>,
    /// Whether this is a trial license.
    #[serde(default)]
    pub trial: bool,
    /// As in the token: empty, `enterprise`, `premium`, or a newer name.
    #[serde(default)]
    pub feature_set: String,
    /// The older notation for `enterprise`; ignored if there is a feature set.
    #[serde(default)]
    pub all_features: bool,
    /// Values by feature name, as in the token, including negative values and unknown names.
    #[serde(default)]
    pub features: BTreeMap<String, i64>,
    /// Addons such as AI governance.
    #[serde(default)]
    pub addons: Vec<String>,
    /// Whether the deployment must send telemetry.
    #[serde(default)]
    pub require_telemetry: bool,
    /// Whether the deployment must publish its usage.
    #[serde(default)]
    pub publish_usage_data: bool,
}

/// The feature set that a license grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureSet {
    /// Only the individually named features. As in coderd, an unknown set means the same.
    None,
    /// `enterprise`, or `all_features` without a set.
    Enterprise,
    /// `premium`
    Premium,
}

/// Validity of a license at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// `nbf` or `iat` is in the future.
    NotYetValid,
    Valid,
    /// The paid term has ended, but the token has not expired.
    InGrace,
    /// `exp` is reached.
    Expired,
    /// `license_expires` is more than five years of 365 days in the future. coderd refuses the
    /// license until this changes.
    TermTooLong,
}

impl Validity {
    /// Whether the license is effective: in its paid term or in the grace period.
    #[must_use]
    pub fn counts(self) -> bool {
        matches!(self, Validity::Valid | Validity::InGrace)
    }
}

impl LicenseClaims {
    /// Whether the license is for this deployment: it names this deployment or none.
    #[must_use]
    pub fn is_for(&self, deployment: Uuid) -> bool {
        self.deployment_ids.is_empty()
            || self.deployment_ids.iter().any(|id| id.parse() == Ok(deployment))
    }

    /// The validity at `now`. The token is valid from `nbf` until just before `exp`; the grace
    /// period begins just after `license_expires`.
    #[must_use]
    pub fn validity(&self, now: DateTime<Utc>) -> Validity {
        if self.license_expires.signed_duration_since(now) > LONGEST_TERM {
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

    /// The next change of the validity after `now`, and the new validity. `None` if it never
    /// changes again.
    #[must_use]
    pub fn next_edge(&self, now: DateTime<Utc>) -> Option<(DateTime<Utc>, Validity)> {
        let current = self.validity(now);
        // the grace period begins just after the last instant of the paid term
        let grace = self.license_expires.checked_add_signed(TimeDelta::microseconds(1));
        let short_enough = self.license_expires.checked_sub_signed(LONGEST_TERM);
        let mut edges: Vec<DateTime<Utc>> = [
            Some(self.issued_at),
            Some(self.not_before),
            Some(self.expires_at),
            grace,
            short_enough,
        ]
        .into_iter()
        .flatten()
        .collect();
        edges.sort_unstable();
        let later = edges.into_iter().filter(|at| *at > now).map(|at| (at, self.validity(at)));
        later.into_iter().find(|(_, validity)| *validity != current)
    }

    /// The effective feature set, including the older flag.
    #[must_use]
    pub fn feature_set(&self) -> FeatureSet {
        match (self.feature_set.as_str(), self.all_features) {
            ("premium", _) => FeatureSet::Premium,
            ("enterprise", _) | ("", true) => FeatureSet::Enterprise,
            _ => FeatureSet::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    fn claims(issued: &str, from: &str, expires: &str, end: &str) -> LicenseClaims {
        let (issued, from, expires, end) = (at(issued), at(from), at(expires), at(end));
        let claims = serde_json::json!({ "issued_at": issued, "not_before": from, "license_expires": expires, "expires_at": end,
            "account_type": "salesforce", "account_id": "account-1" });
        serde_json::from_value(claims).expect("claims")
    }

    #[test]
    fn each_edge_of_a_license_comes_after_the_one_before() {
        let license = claims(
            "2025-08-01T09:00:00Z",
            "2025-08-02T10:00:00Z",
            "2026-08-01T10:00:00Z",
            "2026-09-01T10:00:00Z",
        );
        let mut now = at("2025-01-01T00:00:00Z");
        let mut edges = Vec::new();
        while let Some((next, validity)) = license.next_edge(now) {
            edges.push((next, validity));
            now = next;
        }
        let expected = [
            (at("2025-08-02T10:00:00Z"), Validity::Valid),
            (at("2026-08-01T10:00:00.000001Z"), Validity::InGrace),
            (at("2026-09-01T10:00:00Z"), Validity::Expired),
        ];
        assert_eq!(edges, expected);
    }

    #[test]
    fn a_license_issued_after_it_begins_and_one_without_grace_have_no_edge_in_between() {
        let license = claims(
            "2025-08-03T09:00:00Z",
            "2025-08-02T10:00:00Z",
            "2026-08-01T10:00:00Z",
            "2026-08-01T10:00:00Z",
        );
        assert_eq!(
            license.next_edge(at("2025-08-02T00:00:00Z")),
            Some((at("2025-08-03T09:00:00Z"), Validity::Valid))
        );
        assert_eq!(
            license.next_edge(at("2025-08-03T09:00:00Z")),
            Some((at("2026-08-01T10:00:00Z"), Validity::Expired))
        );
    }

    #[test]
    fn a_term_that_is_too_long_counts_once_five_years_are_left() {
        let license = claims(
            "2025-01-01T00:00:00Z",
            "2025-01-01T00:00:00Z",
            "2035-01-01T00:00:00Z",
            "2035-02-01T00:00:00Z",
        );
        let five_years_before = at("2035-01-01T00:00:00Z") - TimeDelta::days(5 * 365);
        assert_eq!(
            license.next_edge(at("2026-01-01T00:00:00Z")),
            Some((five_years_before, Validity::Valid))
        );
    }
}
