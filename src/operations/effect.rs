//! The effect of new events on metrics, license counts and publications. The real folds apply the
//! events in memory, on top of the current state. The rules have no second implementation.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::OperationError;
use super::series::series;
use crate::event::{Event, Fact, Payload};
use crate::ledger::Ledger;
use crate::projection::{self, ProjectionError};
use crate::stages::{LedgerFault, LicensesState, MetricsState, Stage};

/// Effect of new events.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Effect {
    /// Deployments that the ledger does not know yet. Their first event introduces them.
    pub introduced: Vec<Uuid>,
    /// Managed agents in the usage period of each license, before and after.
    pub licenses: Vec<WindowEffect>,
    /// Publications that would be queued.
    pub publications: Vec<Queued>,
    /// Effect on each family of metrics.
    pub metrics: Vec<FamilyEffect>,
}

/// The managed agents of one license's usage period.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WindowEffect {
    /// Id of the deployment.
    pub deployment: Uuid,
    /// coderd's own id of the license.
    pub license_id: i32,
    /// Start of the usage period: `nbf`, included.
    pub start: DateTime<Utc>,
    /// End of the usage period: `exp`, not included.
    pub end: DateTime<Utc>,
    /// Managed agents now.
    pub before: u64,
    /// Managed agents after the change.
    pub after: u64,
}

/// Usage of one type that would be queued for publication. As for all usage, the publisher decides
/// later whether it sends the event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Queued {
    /// Id of the deployment.
    pub deployment: Uuid,
    /// Tallyman's name of the usage type.
    pub event_type: String,
    /// Number of events.
    pub events: u64,
    /// Sum of their quantities in the type's unit. A decimal string, because the sum may exceed 64
    /// bits.
    pub units: String,
}

/// Effect on one family of metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FamilyEffect {
    /// Id of the deployment.
    pub deployment: Uuid,
    /// Name of the family.
    pub family: String,
    /// Increase of its counters, or number of new observations of its histograms.
    pub added: u64,
    /// Seconds that the observations add to the sums of a histogram; absent for counters.
    pub added_seconds: Option<f64>,
}

impl Effect {
    /// Whether nothing would change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { introduced, licenses, publications, metrics } = self;
        introduced.is_empty()
            && publications.is_empty()
            && metrics.is_empty()
            && licenses.iter().all(|window| window.before == window.after)
    }

    /// The part that an execution must reproduce. Live events may raise `before` and `after`
    /// together; the effect is still the same.
    pub(super) fn essence(&self) -> impl Serialize + use<> {
        let Self { introduced, licenses, publications, metrics } = self.clone();
        let gains = licenses.into_iter().filter(|window| window.after != window.before);
        let gains: Vec<_> = gains
            .map(|window| {
                (
                    window.deployment,
                    window.license_id,
                    window.start,
                    window.end,
                    window.after - window.before,
                )
            })
            .collect();
        (introduced, gains, publications, metrics)
    }
}

/// Collects the effect of events.
pub(super) struct Effects {
    now: DateTime<Utc>,
    metrics: Changing<MetricsState>,
    licenses: Changing<LicensesState>,
    introduced: BTreeSet<Uuid>,
    queued: BTreeMap<(Uuid, &'static str), (u64, u128)>,
    broken: Option<LedgerFault>,
}

/// A state before and after some facts.
pub(super) struct Changing<S> {
    pub before: S,
    pub after: S,
}

impl<S: Stage + Clone> Changing<S> {
    pub(super) async fn begin(ledger: &Ledger) -> Result<Self, ProjectionError> {
        let state: S = projection::fold_on(ledger, i64::MAX).await?.state;
        Ok(Self { before: state.clone(), after: state })
    }
}

impl Effects {
    /// Starts from the current state of the ledger.
    pub(super) async fn begin(ledger: &Ledger) -> Result<Self, OperationError> {
        Ok(Self {
            now: ledger.clock.now(),
            metrics: Changing::begin(ledger).await?,
            licenses: Changing::begin(ledger).await?,
            introduced: BTreeSet::new(),
            queued: BTreeMap::new(),
            broken: None,
        })
    }

    /// Adds an event that would be accepted.
    pub(super) fn add(&mut self, event: &Event) {
        let deployment = event.deployment;
        if self.metrics.after.deployment(deployment).is_none() {
            self.introduced.insert(deployment);
            self.apply(&Fact::Introduced { deployment, introduced_at: self.now });
        }
        if let Payload::Usage(usage) = &event.payload {
            let queued =
                self.queued.entry((deployment, usage.quantity.usage_type().as_str())).or_default();
            queued.0 += 1;
            queued.1 += u128::from(usage.quantity.number());
        }
        self.apply(&Fact::Event(event.clone()));
    }

    fn apply(&mut self, fact: &Fact) {
        let applied = self.metrics.after.apply(fact).and_then(|()| self.licenses.after.apply(fact));
        self.broken = self.broken.take().or(applied.err());
    }

    pub(super) fn end(self) -> Result<Effect, OperationError> {
        if let Some(broken) = self.broken {
            return Err(OperationError::Internal(broken.into()));
        }
        let publications =
            self.queued.into_iter().map(|((deployment, event_type), (events, units))| Queued {
                deployment,
                event_type: event_type.to_owned(),
                events,
                units: units.to_string(),
            });
        Ok(Effect {
            introduced: self.introduced.into_iter().collect(),
            licenses: windows(&self.licenses),
            publications: publications.collect(),
            metrics: families(&self.metrics),
        })
    }
}

/// The usage period of each license, before and after.
pub(super) fn windows(licenses: &Changing<LicensesState>) -> Vec<WindowEffect> {
    let mut windows = Vec::new();
    for (deployment, after) in licenses.after.deployments() {
        let before = licenses.before.deployment(deployment);
        for license in &after.licenses {
            let Some(claims) = &license.claims else { continue };
            let (start, end) = (claims.not_before, claims.expires_at);
            windows.push(WindowEffect {
                deployment,
                license_id: license.license_id,
                start,
                end,
                before: before.map_or(0, |before| saturating(before.agents.count(start, end))),
                after: saturating(after.agents.count(start, end)),
            });
        }
    }
    windows
}

fn families(metrics: &Changing<MetricsState>) -> Vec<FamilyEffect> {
    let mut added: BTreeMap<(Uuid, &'static str), (u64, Option<i128>)> = BTreeMap::new();
    let before = series(&metrics.before);
    for (key, after) in series(&metrics.after) {
        let before = before.get(&key);
        let family =
            added.entry((key.deployment, key.family)).or_insert((0, after.sum_micros().map(|_| 0)));
        family.0 += after.count() - before.map_or(0, |before| before.count());
        if let (Some(sum), Some(after)) = (&mut family.1, after.sum_micros()) {
            *sum += after - before.and_then(|before| before.sum_micros()).unwrap_or(0);
        }
    }
    let changed = added.into_iter().filter(|(_, (count, _))| *count > 0);
    changed
        .map(|((deployment, family), (added, sum))| FamilyEffect {
            deployment,
            family: family.to_owned(),
            added,
            added_seconds: sum.map(|micros| micros as f64 / 1e6),
        })
        .collect()
}

/// A count limited to 64 bits, far beyond any license limit.
pub(super) fn saturating(count: u128) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
