//! Stage `metrics`: number of workspace creations, and durations of creations and claims.
//!
//! Names, labels, classic buckets and native settings are coderd's own, but native histograms are
//! never reset.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use chrono::{DateTime, Utc};
use prometheus::proto::MetricFamily;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::effects::{Effect, effects_of};
use super::families::{CLAIM_SECONDS, CREATION_SECONDS, CREATIONS, NEGATIVE_DURATIONS};
use super::{LedgerFault, Stage};
use crate::event::Fact;
use crate::metrics::{Counter, Series, Tally};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsState {
    deployments: BTreeMap<Uuid, DeploymentMetrics>,
}

/// The series of one deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeploymentMetrics {
    /// Histograms begin at this instant.
    pub introduced_at: DateTime<Utc>,
    pub creations: Series<Counter, 3>,
    pub creation_seconds: Series<Tally, 4>,
    pub claim_seconds: Series<Tally, 3>,
    pub negative_durations: Series<Counter, 1>,
}

impl Stage for MetricsState {
    const NAME: &'static str = "metrics";
    // 2: a success that ends when it starts is observed as 0; a workspace is one creation
    // 3: buckets without resets, zero threshold and negative values
    const RULES_VERSION: i32 = 3;

    fn apply(&mut self, fact: &Fact) -> Result<(), LedgerFault> {
        match (self.deployments.entry(fact.deployment()), fact) {
            (Entry::Vacant(new), Fact::Introduced { introduced_at, .. }) => {
                new.insert(DeploymentMetrics::introduced(*introduced_at));
            }
            (Entry::Occupied(known), Fact::Introduced { .. }) => {
                return Err(LedgerFault::IntroducedTwice(*known.key()));
            }
            (Entry::Vacant(unknown), _) => return Err(LedgerFault::NotIntroduced(*unknown.key())),
            (Entry::Occupied(mut known), fact) => known.get_mut().apply(fact),
        }
        Ok(())
    }
}

impl MetricsState {
    /// The introduced deployments, by id.
    pub fn deployments(&self) -> impl Iterator<Item = (Uuid, &DeploymentMetrics)> {
        self.deployments.iter().map(|(id, metrics)| (*id, metrics))
    }

    /// Series of one deployment, if it was introduced.
    #[must_use]
    pub fn deployment(&self, id: Uuid) -> Option<&DeploymentMetrics> {
        self.deployments.get(&id)
    }
}

impl DeploymentMetrics {
    fn introduced(introduced_at: DateTime<Utc>) -> Self {
        Self {
            introduced_at,
            creations: Series::new(),
            creation_seconds: Series::new(),
            claim_seconds: Series::new(),
            negative_durations: Series::new(),
        }
    }

    fn apply(&mut self, fact: &Fact) {
        match fact {
            // The time of these creations is not known. A server ignores the epoch as a timestamp.
            // So it does not show years of history as one increase from zero.
            Fact::Baseline { series, creations, .. } => {
                self.creations.add(series.clone(), *creations, DateTime::UNIX_EPOCH)
            }
            Fact::Event(event) => {
                for effect in effects_of(event, self.introduced_at).added {
                    self.add(effect, event.time());
                }
            }
            Fact::Introduced { .. } | Fact::License { .. } => {}
        }
    }

    fn add(&mut self, effect: Effect, at: DateTime<Utc>) {
        match effect {
            Effect::Creation(labels) => self.creations.add(labels, 1, at),
            Effect::CreationSeconds(labels, micros) => {
                self.creation_seconds.observe_micros(&CREATION_SECONDS.buckets, labels, micros, at)
            }
            Effect::ClaimSeconds(labels, micros) => {
                self.claim_seconds.observe_micros(&CLAIM_SECONDS.buckets, labels, micros, at)
            }
            Effect::NegativeDuration(labels) => self.negative_durations.add(labels, 1, at),
        }
    }

    /// All families for exposition, including families without series.
    #[must_use]
    pub fn families(&self) -> Vec<MetricFamily> {
        vec![
            CREATIONS.show(&self.creations),
            CREATION_SECONDS.show(&self.creation_seconds),
            CLAIM_SECONDS.show(&self.claim_seconds),
            NEGATIVE_DURATIONS.show(&self.negative_durations),
        ]
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
