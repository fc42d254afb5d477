//! What `/metrics` shows of the metrics state.

use prometheus::proto::MetricFamily;
use uuid::Uuid;

use super::{Standing, View};
use crate::stages::MetricsState;

/// The families of one deployment, and up to where they are true.
#[derive(Clone, Debug)]
pub struct ShownFamilies {
    /// The state they were made of. The holder of `/metrics` raises its `shown_sequence` to this before it answers.
    pub standing: Standing,
    /// Empty where the deployment is not known or its series are withheld.
    pub families: Vec<MetricFamily>,
}

/// The families of one deployment, all of one moment. `withheld`: the first backfill is not complete, and years of history must not be
/// one spike. Nothing while there is no state.
#[must_use]
pub fn families(view: &View<MetricsState>, deployment: Uuid, withheld: bool) -> Option<ShownFamilies> {
    view.with(|state, standing| {
        let known = state.deployment(deployment).filter(|_| !withheld);
        ShownFamilies { standing, families: known.map(|metrics| metrics.families()).unwrap_or_default() }
    })
}
