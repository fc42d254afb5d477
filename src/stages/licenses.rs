//! Stage `licenses`: the licenses of a deployment, and its started managed agents.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{AgentCounts, LedgerFault, Stage};
use crate::event::{Event, Fact, Payload, UsageQuantity};
use crate::license::{Entitlements, LicenseClaims, RuleSet, entitlements};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LicensesState {
    deployments: BTreeMap<Uuid, DeploymentLicenses>,
}

/// Licenses and managed agents of one deployment. AI seats and agent runtime are not folded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeploymentLicenses {
    /// Managed agents, countable over any window.
    pub agents: AgentCounts,
    /// Licenses in coderd, ordered by coderd's id.
    pub licenses: Vec<KnownLicense>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownLicense {
    /// coderd's own id of the license.
    pub license_id: i32,
    /// SHA-256 of the token in hex. It identifies the license.
    pub jwt_sha256: String,
    /// `None` if the token's verification failed.
    pub claims: Option<LicenseClaims>,
}

impl Stage for LicensesState {
    const NAME: &'static str = "licenses";
    const RULES_VERSION: i32 = 1;

    fn apply(&mut self, fact: &Fact) -> Result<(), LedgerFault> {
        match (self.deployments.entry(fact.deployment()), fact) {
            (Entry::Vacant(new), Fact::Introduced { .. }) => {
                new.insert(DeploymentLicenses::default());
            }
            (Entry::Occupied(known), Fact::Introduced { .. }) => {
                return Err(LedgerFault::IntroducedTwice(*known.key()));
            }
            (Entry::Vacant(unknown), _) => return Err(LedgerFault::NotIntroduced(*unknown.key())),
            (Entry::Occupied(mut known), fact) => known.get_mut().apply(fact)?,
        }
        Ok(())
    }
}

impl LicensesState {
    /// The introduced deployments, by id.
    pub fn deployments(&self) -> impl Iterator<Item = (Uuid, &DeploymentLicenses)> {
        self.deployments.iter().map(|(id, licenses)| (*id, licenses))
    }

    /// Licenses and agents of one deployment, if it was introduced.
    #[must_use]
    pub fn deployment(&self, id: Uuid) -> Option<&DeploymentLicenses> {
        self.deployments.get(&id)
    }
}

impl DeploymentLicenses {
    fn apply(&mut self, fact: &Fact) -> Result<(), LedgerFault> {
        match fact {
            Fact::Event(event @ Event { payload: Payload::Usage(_), .. }) => {
                if let Some((at, count)) = agents_of(event) {
                    self.agents.add(at, count);
                }
            }
            Fact::License { license_id, jwt_sha256, present, claims, .. } => {
                let claims = claims.as_ref().map(LicenseClaims::deserialize).transpose();
                let claims = claims.map_err(|error| LedgerFault::Claims {
                    license_id: *license_id,
                    problem: error.to_string(),
                })?;
                let jwt_sha256 = hex::encode(jwt_sha256);
                self.licenses.retain(|license| license.jwt_sha256 != jwt_sha256);
                if *present {
                    let place =
                        self.licenses.partition_point(|other| other.license_id <= *license_id);
                    self.licenses.insert(
                        place,
                        KnownLicense { license_id: *license_id, jwt_sha256, claims },
                    );
                }
            }
            Fact::Corrected { deployment, before, after } => {
                if let Some((at, count)) = before.as_deref().and_then(agents_of)
                    && !self.agents.remove(at, count)
                {
                    return Err(LedgerFault::NotCounted(*deployment));
                }
                if let Some((at, count)) = after.as_deref().and_then(agents_of) {
                    self.agents.add(at, count);
                }
            }
            Fact::Event(_) | Fact::Introduced { .. } | Fact::Baseline { .. } => {}
        }
        Ok(())
    }

    /// The entitlements of the deployment at `now`. `actual` is counted over the winning license's
    /// half-open period. A license whose token failed its verification is an error in the answer
    /// and grants nothing.
    #[must_use]
    pub fn entitlements(&self, rules: RuleSet, now: DateTime<Utc>) -> Entitlements {
        self.entitlements_by(&self.licenses, rules, now)
    }

    /// The entitlements with these licenses instead, ordered by coderd's id.
    #[must_use]
    pub fn entitlements_by(
        &self,
        licenses: &[KnownLicense],
        rules: RuleSet,
        now: DateTime<Utc>,
    ) -> Entitlements {
        let claims: Vec<LicenseClaims> =
            licenses.iter().filter_map(|license| license.claims.clone()).collect();
        // The count is exact. The answer is limited to 64 bits, far beyond any license limit.
        let mut answer = entitlements(rules, &claims, now, |start, end| {
            u64::try_from(self.agents.count(start, end)).unwrap_or(u64::MAX)
        });
        let refused = licenses.iter().filter(|license| license.claims.is_none());
        answer.errors.extend(refused.map(|license| {
            format!("Invalid license (id {}): its token did not verify", license.license_id)
        }));
        answer
    }
}

/// The managed agents that an event starts, and when.
fn agents_of(event: &Event) -> Option<(DateTime<Utc>, u64)> {
    match &event.payload {
        Payload::Usage(usage) => match usage.quantity {
            UsageQuantity::ManagedAgents(count) => Some((usage.created_at, count)),
            _ => None,
        },
        Payload::Build(_) | Payload::Claim(_) => None,
    }
}

#[cfg(test)]
#[path = "licenses_tests.rs"]
mod tests;
