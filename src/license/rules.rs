//! Derives the entitlements of a deployment from its licenses, by a set of rules.
//!
//! Pure: callers pass the time and the count. Tallyline counts only the feature of managed agents.

use std::borrow::Borrow;
use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, TimeDelta, TimeZone as _, Utc};
use serde::{Deserialize, Serialize};

use super::claims::{FeatureSet, LicenseClaims, Validity};
use super::entitlements::{Entitlement, Entitlements, Feature, MANAGED_AGENT_LIMIT, UsagePeriod};

const SOFT_KEY: &str = "managed_agent_limit_soft";
const HARD_KEY: &str = "managed_agent_limit_hard";
const USER_LIMIT: &str = "user_limit";

/// A set of license rules, by its first month.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuleSet {
    /// From July 2025: a soft and a hard limit, and a premium default from the user limit.
    #[default]
    #[serde(rename = "2025-07")]
    Y2025M07,
    /// From February 2026: one limit, and a premium default of 1000.
    #[serde(rename = "2026-02")]
    Y2026M02,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule set {0:?} is unknown; expected \"2025-07\" or \"2026-02\"")]
pub struct UnknownRuleSet(pub String);

impl fmt::Display for RuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RuleSet::Y2025M07 => "2025-07",
            RuleSet::Y2026M02 => "2026-02",
        })
    }
}

impl FromStr for RuleSet {
    type Err = UnknownRuleSet;

    fn from_str(name: &str) -> Result<Self, UnknownRuleSet> {
        match name {
            "2025-07" => Ok(RuleSet::Y2025M07),
            "2026-02" => Ok(RuleSet::Y2026M02),
            other => Err(UnknownRuleSet(other.to_owned())),
        }
    }
}

/// The entitlements of a deployment at `now`.
///
/// `licenses` have coderd's order (by id). `actual` counts managed agents from the first instant,
/// included, to the second, not included. It is called at most once, with the period of the winning
/// license, and only if there is one.
pub fn entitlements(
    rules: RuleSet,
    licenses: &[impl Borrow<LicenseClaims>],
    now: DateTime<Utc>,
    actual: impl Fn(DateTime<Utc>, DateTime<Utc>) -> u64,
) -> Entitlements {
    let mut answer = Entitlements {
        features: [(MANAGED_AGENT_LIMIT.to_owned(), Feature::not_entitled())].into(),
        warnings: Vec::new(),
        errors: Vec::new(),
        has_license: false,
        trial: false,
        require_telemetry: false,
        refreshed_at: now,
    };
    let mut agents: Option<Feature> = None;
    for license in licenses.iter().map(Borrow::<LicenseClaims>::borrow) {
        let validity = license.validity(now);
        if validity == Validity::TermTooLong {
            answer.errors.push(format!(
                "Invalid license ({}): license_expires is more than 5 years ahead",
                name(license)
            ));
        }
        if !validity.counts() {
            continue;
        }
        answer.has_license = true;
        answer.trial = license.trial;
        answer.require_telemetry |= license.require_telemetry;
        if rules == RuleSet::Y2025M07 && license.features.contains_key(MANAGED_AGENT_LIMIT) {
            answer.errors.push(format!(
                "Feature {MANAGED_AGENT_LIMIT} is forbidden to be set in a license."
            ));
        }
        match managed_agent_limit(rules, license) {
            Ok(Some(grant)) => {
                let granted = grant.feature(validity);
                if agents.as_ref().is_none_or(|first| beats(&granted, first)) {
                    agents = Some(granted);
                }
            }
            Ok(None) => {}
            Err(reason) => answer.errors.push(reason),
        }
    }
    answer.warnings.extend(expiry_warning(licenses, answer.trial, now));
    if let Some(mut agents) = agents {
        if let Some(period) = agents.usage_period {
            agents.actual =
                Some(i64::try_from(actual(period.start, period.end)).unwrap_or(i64::MAX));
        }
        answer.warnings.extend(limit_warning(rules, &agents));
        answer.features.insert(MANAGED_AGENT_LIMIT.to_owned(), agents);
    }
    answer
}

/// The license for publishing usage at `now`: the one issued last of those that coderd would use.
/// Of equals, the first of `candidates`, which must be ordered by their ids.
pub fn pick_publishing_license<'a, Id>(
    candidates: impl IntoIterator<Item = (Id, &'a LicenseClaims)>,
    now: DateTime<Utc>,
) -> Option<(Id, &'a LicenseClaims)> {
    candidates
        .into_iter()
        .filter(|(_, license)| {
            license.validity(now).counts()
                && license.account_type == "salesforce"
                && license.publish_usage_data
        })
        // the first minimum, so the first of those issued last
        .min_by_key(|(_, license)| Reverse(license.issued_at))
}

/// The name of a license in errors. The claims contain an id only in some licenses.
fn name(license: &LicenseClaims) -> String {
    match &license.token_id {
        Some(id) => id.clone(),
        None => format!(
            "issued at {}",
            license.issued_at.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
        ),
    }
}

/// A license's grant of managed agents.
struct Grant {
    soft: Option<i64>,
    limit: i64,
    enabled: bool,
    period: UsagePeriod,
}

impl Grant {
    /// A grant by keys of the license, for its own period. A limit of 0 grants the feature but
    /// disables it.
    fn explicit(license: &LicenseClaims, soft: Option<i64>, limit: i64) -> Self {
        let period = UsagePeriod {
            issued_at: license.issued_at,
            start: license.not_before,
            end: license.expires_at,
        };
        Grant { soft, limit, enabled: limit > 0, period }
    }

    /// A default grant. Its period is so old that the values of any real license win, even if they
    /// are smaller.
    fn default(soft: Option<i64>, limit: i64) -> Self {
        let first_of_july = |year| {
            Utc.with_ymd_and_hms(year, 7, 1, 0, 0, 0).single().expect("the first of July exists")
        };
        let start = first_of_july(2025);
        Grant {
            soft,
            limit,
            enabled: true,
            period: UsagePeriod { issued_at: start, start, end: first_of_july(2125) },
        }
    }

    fn feature(self, validity: Validity) -> Feature {
        let entitlement = if validity == Validity::InGrace {
            Entitlement::GracePeriod
        } else {
            Entitlement::Entitled
        };
        Feature {
            entitlement,
            enabled: self.enabled,
            limit: Some(self.limit),
            soft_limit: self.soft,
            actual: None,
            usage_period: Some(self.period),
        }
    }
}

/// The grant of `license` under `rules`. `Err` contains the license error to show. Negative values
/// are treated as absent.
fn managed_agent_limit(rules: RuleSet, license: &LicenseClaims) -> Result<Option<Grant>, String> {
    let value = |key: &str| license.features.get(key).copied().filter(|value| *value >= 0);
    let premium = license.feature_set() == FeatureSet::Premium;
    let invalid = |reason: &str| {
        Err(format!("Invalid license ({}): feature {MANAGED_AGENT_LIMIT} {reason}", name(license)))
    };
    match rules {
        RuleSet::Y2025M07 => match (value(SOFT_KEY), value(HARD_KEY)) {
            (Some(soft), Some(hard)) if hard < soft => {
                invalid("has a hard limit less than the soft limit")
            }
            (Some(soft), Some(hard)) => Ok(Some(Grant::explicit(license, Some(soft), hard))),
            (None, None) => {
                // coderd sets the default where it handles the user limit, so the default needs a
                // positive user limit
                let users = value(USER_LIMIT).filter(|users| premium && *users > 0);
                Ok(users.map(|users| {
                    Grant::default(Some(users.saturating_mul(800)), users.saturating_mul(1000))
                }))
            }
            _ => invalid("has missing soft or hard limit values"),
        },
        RuleSet::Y2026M02 => {
            // if a license has both keys, the newer name takes precedence
            let limit = value(MANAGED_AGENT_LIMIT).or_else(|| value(SOFT_KEY));
            let explicit = limit.map(|limit| Grant::explicit(license, None, limit));
            Ok(explicit.or_else(|| premium.then(|| Grant::default(None, 1000))))
        }
    }
}

/// Whether `new` replaces `first`. Both are granted by licenses. The one issued later wins, even
/// with a lower limit. Then the later end wins, the better entitlement, the higher limit, the
/// enabled one. Of equals the first remains. Soft limits are not compared.
fn beats(new: &Feature, first: &Feature) -> bool {
    let rank = |feature: &Feature| {
        let period = feature.usage_period;
        let limit = (feature.limit.is_none(), feature.limit);
        (
            period.map(|p| p.issued_at),
            period.map(|p| p.end),
            feature.entitlement,
            limit,
            feature.enabled,
        )
    };
    rank(new) > rank(first)
}

fn limit_warning(rules: RuleSet, agents: &Feature) -> Option<String> {
    let (Some(limit), Some(actual), true) = (agents.limit, agents.actual, agents.enabled) else {
        return None;
    };
    match rules {
        RuleSet::Y2025M07 if actual >= limit => Some(
            "You have built more workspaces with managed agents than your license allows. Further managed agent builds will be blocked."
                .to_owned(),
        ),
        RuleSet::Y2025M07 if actual >= early_threshold(agents.soft_limit.unwrap_or(0), limit) => Some(
            "You are approaching the managed agent limit in your license. Please refer to the Deployment Licenses page for more information."
                .to_owned(),
        ),
        RuleSet::Y2026M02 if actual >= limit => {
            Some("You have built more workspaces with managed agents than your license allows.".to_owned())
        }
        _ => None,
    }
}

/// The threshold of a near limit: three quarters of the way from soft to hard, or of hard alone if
/// the soft limit is not usable.
fn early_threshold(soft: i64, hard: i64) -> i64 {
    // Rounded down. The product may exceed 64 bits.
    let three_quarters = |n: i64| i64::try_from(i128::from(n).saturating_mul(3) / 4).unwrap_or(n);
    if hard > soft && soft > 0 {
        soft.saturating_add(three_quarters(hard.saturating_sub(soft)))
    } else {
        three_quarters(hard)
    }
}

/// A warning if the first continuous sequence of paid terms ends in fewer than 30 days (7 for a
/// trial). It includes licenses that begin later: one that continues without a gap prevents the
/// warning.
fn expiry_warning(
    licenses: &[impl Borrow<LicenseClaims>],
    trial: bool,
    now: DateTime<Utc>,
) -> Option<String> {
    let known = |license: &&LicenseClaims| {
        !matches!(license.validity(now), Validity::Expired | Validity::TermTooLong)
    };
    let mut terms: Vec<_> = licenses
        .iter()
        .map(Borrow::<LicenseClaims>::borrow)
        .filter(known)
        .map(|license| (license.not_before, license.license_expires))
        .collect();
    terms.sort_unstable();
    let (_, mut end) = *terms.first()?;
    for (start, later_end) in terms {
        if start > end {
            break;
        }
        end = end.max(later_end);
    }
    let days = whole_days_rounded_up(end.signed_duration_since(now));
    let soon = if trial { 7 } else { 30 };
    (days > 0 && days < soon).then(|| {
        format!("Your license expires in {days} {}.", if days == 1 { "day" } else { "days" })
    })
}

fn whole_days_rounded_up(left: TimeDelta) -> i64 {
    let days = left.num_days();
    if left > TimeDelta::days(days) { days.saturating_add(1) } else { days }
}
