//! License tokens, their claims and the rules that turn them into entitlements.
//!
//! [`PublicKeys::verify`] turns a token into [`LicenseClaims`] without asking the time, so that the claims can be kept for ever;
//! [`LicenseClaims::validity`] judges them at an instant; [`entitlements`] folds all licenses of a deployment into the answer that
//! coderd gives under `GET /api/v2/entitlements`.

mod claims;
mod entitlements;
mod rules;
mod token;

pub use claims::{FeatureSet, LicenseClaims, Validity};
pub use entitlements::{Entitlement, Entitlements, Feature, MANAGED_AGENT_LIMIT, UsagePeriod};
pub use rules::{RuleSet, UnknownRuleSet, entitlements, pick_publishing_license};
pub use token::{KeyError, LicenseError, MAX_TOKEN_BYTES, PublicKeys, VerifiedLicense};

#[cfg(test)]
mod token_tests;

#[cfg(test)]
mod rules_tests;
