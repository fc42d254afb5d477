//! What new events would change in what is shown and billed: they are fed to the pure folds in memory, on top of the state as it is now. There is no
//! second form of the rules.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::OperationError;
use super::series::series;
use crate::event::{Event, Fact, Payload};
use crate::ledger::Ledger;
use crate::projection::{self, ProjectionError};
use crate::stages::{Broken, LicensesState, MetricsState, Stage};

/// What would change by events that are added.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Effect {
    /// Deployments that the ledger does not know yet: each is introduced by its first event.
    pub introduced: Vec<Uuid>,
    /// Managed agents in the usage period of each license, before and after.
    pub licenses: Vec<WindowEffect>,
    /// Publications that would be queued.
    pub publications: Vec<Queued>,
    /// What would come to the metrics' families.
    pub metrics: Vec<FamilyEffect>,
}

/// The managed agents of one license's usage period.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WindowEffect {
    /// The deployment.
    pub deployment: Uuid,
    /// coderd's own id of the license.
    pub license_id: i32,
    /// `nbf`, included.
    pub start: DateTime<Utc>,
    /// `exp`, not included.
    pub end: DateTime<Utc>,
    /// Managed agents now.
    pub before: u64,
    /// Managed agents afterwards.
    pub after: u64,
}

/// Usage of one type that would be queued for publication. Whether it is sent or is another's is decided later, as for all usage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Queued {
    /// The deployment.
    pub deployment: Uuid,
    /// Tallyman's type.
    pub event_type: String,
    /// How many events.
    pub events: u64,
    /// Their quantities together, in the type's unit; a text, for the sum may pass 64 bits.
    pub units: String,
}

/// What would come to one family of metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FamilyEffect {
    /// The deployment.
    pub deployment: Uuid,
    /// The family's name.
    pub family: String,
    /// By how much its counters would rise, or how many observations its histograms would get.
    pub added: u64,
    /// For a histogram, what the observations add to its sums, in seconds.
    pub added_seconds: Option<f64>,
}

impl Effect {
    /// Nothing would change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { introduced, licenses, publications, metrics } = self;
        introduced.is_empty()
            && publications.is_empty()
            && metrics.is_empty()
            && licenses.iter().all(|window| window.before == window.after)
    }

    /// What an execution must still bring about. Live events beside it may raise `before` and `after` together; that is no other effect.
    pub(super) fn essence(&self) -> impl Serialize + use<> {
        let Self { introduced, licenses, publications, metrics } = self.clone();
        let gains = licenses.into_iter().filter(|window| window.after != window.before);
        let gains: Vec<_> =
            gains.map(|window| (window.deployment, window.license_id, window.start, window.end, window.after - window.before)).collect();
        (introduced, gains, publications, metrics)
    }
}

/// Gathers what events would change.
pub(super) struct Effects {
    now: DateTime<Utc>,
    metrics: Changing<MetricsState>,
    licenses: Changing<LicensesState>,
    introduced: BTreeSet<Uuid>,
    queued: BTreeMap<(Uuid, &'static str), (u64, u128)>,
    broken: Option<Broken>,
}

/// A state as it is, and as it would be.
struct Changing<S> {
    before: S,
    after: S,
}

impl<S: Stage + Clone> Changing<S> {
    async fn begin(ledger: &Ledger) -> Result<Self, ProjectionError> {
        let state: S = projection::fold_on(ledger, i64::MAX).await?.state;
        Ok(Self { before: state.clone(), after: state })
    }
}

impl Effects {
    /// On top of the ledger as it is now.
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

    /// One event that would be accepted.
    pub(super) fn add(&mut self, event: &Event) {
        let deployment = event.deployment;
        if self.metrics.after.deployment(deployment).is_none() {
            self.introduced.insert(deployment);
            self.apply(&Fact::Introduced { deployment, introduced_at: self.now });
        }
        if let Payload::Usage(usage) = &event.payload {
            let queued = self.queued.entry((deployment, usage.quantity.usage_type().as_str())).or_default();
            queued.0 += 1;
            queued.1 += u128::from(usage.quantity.number());
        }
        self.apply(&Fact::Event(event.clone()));
    }

    fn apply(&mut self, fact: &Fact) {
        let applied = self.metrics.after.apply(fact).and_then(|()| self.licenses.after.apply(fact));
        self.broken = self.broken.take().or(applied.err());
    }

    /// All that would change.
    pub(super) fn end(self) -> Result<Effect, OperationError> {
        if let Some(broken) = self.broken {
            return Err(OperationError::Internal(broken.into()));
        }
        let publications = self.queued.into_iter().map(|((deployment, event_type), (events, units))| Queued {
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

fn windows(licenses: &Changing<LicensesState>) -> Vec<WindowEffect> {
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

/// Each family that would change.
fn families(metrics: &Changing<MetricsState>) -> Vec<FamilyEffect> {
    let mut added: BTreeMap<(Uuid, &'static str), (u64, Option<i128>)> = BTreeMap::new();
    let before = series(&metrics.before);
    for (key, after) in series(&metrics.after) {
        let before = before.get(&key);
        let family = added.entry((key.deployment, key.family)).or_insert((0, after.sum_micros().map(|_| 0)));
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

/// A count as it is told: at most what 64 bits hold, far beyond any limit.
pub(super) fn saturating(count: u128) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
