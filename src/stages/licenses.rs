//! Stage `licenses`: the licenses of a deployment, and its started managed agents.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::pieces::{self, Changed, FORM, Part, Piece, PieceError};
use super::{AgentCounts, LedgerFault, Stage};
use crate::event::{Event, Fact, Payload, UsageQuantity};
use crate::license::{Entitlements, LicenseClaims, RuleSet, entitlements};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LicensesState {
    deployments: BTreeMap<Uuid, DeploymentLicenses>,
    changed: Changed,
}

/// Licenses and managed agents of one deployment. AI seats and agent runtime are not folded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    // 2: pieces
    const RULES_VERSION: i32 = 2;

    fn apply(&mut self, fact: &Fact) -> Result<(), LedgerFault> {
        let deployment = fact.deployment();
        let changed = match (self.deployments.entry(deployment), fact) {
            (Entry::Vacant(new), Fact::Introduced { .. }) => {
                new.insert(DeploymentLicenses::default());
                [Some((Part::Licenses, 0)), None]
            }
            (Entry::Occupied(known), Fact::Introduced { .. }) => {
                return Err(LedgerFault::IntroducedTwice(*known.key()));
            }
            (Entry::Vacant(unknown), _) => return Err(LedgerFault::NotIntroduced(*unknown.key())),
            (Entry::Occupied(mut known), fact) => known.get_mut().apply(fact)?,
        };
        for (part, number) in changed.into_iter().flatten() {
            self.changed.insert(Piece { deployment, part, number });
        }
        Ok(())
    }

    fn take_changed(&mut self) -> BTreeSet<Piece> {
        self.changed.take()
    }

    /// One piece for the licenses of a deployment, and one for each hour with agents.
    fn pieces(&self) -> BTreeSet<Piece> {
        let mut pieces = BTreeSet::new();
        for (&deployment, licenses) in &self.deployments {
            pieces.insert(Piece { deployment, part: Part::Licenses, number: 0 });
            let hours = licenses.agents.hours();
            pieces.extend(hours.map(|number| Piece { deployment, part: Part::Agents, number }));
        }
        pieces
    }

    fn encode(&self, piece: Piece) -> Option<Vec<u8>> {
        let known = self.deployments.get(&piece.deployment)?;
        match piece.part {
            Part::Licenses => Some(pieces::to_json(&known.licenses)),
            Part::Agents => {
                let mut content = vec![FORM];
                known.agents.write_hour(piece.number, &mut content).then_some(content)
            }
            _ => None,
        }
    }

    fn decode(&mut self, piece: Piece, content: &[u8]) -> Result<(), PieceError> {
        match (piece.part, self.deployments.entry(piece.deployment)) {
            (Part::Licenses, Entry::Vacant(new)) => {
                let licenses = pieces::from_json(piece, content)?;
                new.insert(DeploymentLicenses { licenses, ..DeploymentLicenses::default() });
                Ok(())
            }
            (Part::Agents, Entry::Occupied(mut known)) => known
                .get_mut()
                .agents
                .read_hour(piece.number, pieces::body(piece, content)?)
                .map_err(|problem| piece.unreadable(problem)),
            _ => Err(piece.unreadable("it does not belong here")),
        }
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
    /// Returns the changed pieces.
    fn apply(&mut self, fact: &Fact) -> Result<[Option<(Part, i64)>; 2], LedgerFault> {
        Ok(match fact {
            Fact::Event(event) => [self.add(event), None],
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
                [Some((Part::Licenses, 0)), None]
            }
            Fact::Corrected { deployment, before, after } => {
                let removed = before.as_deref().and_then(agents_of).map(|(at, count)| {
                    self.agents.remove(at, count).ok_or(LedgerFault::NotCounted(*deployment))
                });
                let removed = removed.transpose()?.map(|hour| (Part::Agents, hour));
                [removed, after.as_deref().and_then(|event| self.add(event))]
            }
            Fact::Introduced { .. } | Fact::Baseline { .. } => [None, None],
        })
    }

    /// Counts the event's agents. Returns the changed piece.
    fn add(&mut self, event: &Event) -> Option<(Part, i64)> {
        let (at, count) = agents_of(event)?;
        Some((Part::Agents, self.agents.add(at, count)))
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
        let claims: Vec<&LicenseClaims> =
            licenses.iter().filter_map(|license| license.claims.as_ref()).collect();
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
