//! License tokens, their claims, and the rules that derive entitlements from them.
//!
//! [`PublicKeys::verify`] converts a token to [`LicenseClaims`] without using the time, so the
//! claims can be stored permanently. [`LicenseClaims::validity`] evaluates them at an instant.
//! [`entitlements`] folds all licenses of a deployment into coderd's answer to `GET
//! /api/v2/entitlements`.

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
