//! The part of the metrics state that `/metrics` shows.

use prometheus::proto::MetricFamily;
use uuid::Uuid;

use super::{Freshness, View};
use crate::stages::MetricsState;

/// The metric families of one deployment, and their sequence.
#[derive(Clone, Debug)]
pub struct DeploymentFamilies {
    /// The freshness of their state. The holder of `/metrics` raises its `shown_sequence` to this
    /// before it answers.
    pub freshness: Freshness,
    /// Empty if the deployment is unknown or its series are withheld.
    pub families: Vec<MetricFamily>,
}

/// The families of one deployment, all at one sequence. None: no state yet. `withheld`: the first
/// backfill is not complete, and years of history must not appear as one spike.
#[must_use]
pub fn families(
    view: &View<MetricsState>,
    deployment: Uuid,
    withheld: bool,
) -> Option<DeploymentFamilies> {
    view.with(|state, freshness| {
        let known = state.deployment(deployment).filter(|_| !withheld);
        DeploymentFamilies {
            freshness,
            families: known.map(|metrics| metrics.families()).unwrap_or_default(),
        }
    })
}
