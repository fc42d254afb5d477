//! The view in which readers see a state while the fold goes on.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use chrono::{DateTime, Utc};
use prometheus::proto::MetricFamily;
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use super::{Folded, ProjectionError};
use crate::ledger::{Entry, Sequence};
use crate::stages::{MetricsState, Stage};

/// The sequence of a state, and how fresh the state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    pub sequence: Sequence,
    /// The state contains all batches committed before this instant. None until the fold first
    /// reaches the ledger's end.
    pub as_of: Option<DateTime<Utc>>,
}

/// A larger batch is added to a copy of the state without a lock. The copy costs a pointer for each
/// large part and a copy of each changed one, which is more than a small batch costs.
const FACTS_UNDER_LOCK: usize = 200;

/// A reader's handle of a state; clones share it.
///
/// One lock protects the state. Each write adds one batch, so readers see whole batches only. They
/// wait for [`FACTS_UNDER_LOCK`] facts at most once the state has reached the ledger's end.
pub struct View<S>(Arc<Shared<S>>);

struct Shared<S> {
    shown: RwLock<Option<VisibleState<S>>>,
    freshness: watch::Sender<Option<Freshness>>,
    rebuild_progress_at: Mutex<Option<Instant>>,
}

struct VisibleState<S> {
    folded: Folded<S>,
    as_of: Option<DateTime<Utc>>,
}

impl<S> VisibleState<S> {
    fn freshness(&self) -> Freshness {
        Freshness { sequence: self.folded.sequence, as_of: self.as_of }
    }
}

impl<S> Clone for View<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Stage> View<S> {
    pub(super) fn empty() -> Self {
        Self(Arc::new(Shared {
            shown: RwLock::new(None),
            freshness: watch::Sender::new(None),
            rebuild_progress_at: Mutex::default(),
        }))
    }

    /// Calls `read` with the state, which is locked during the call: keep it short. None before the
    /// fold starts or after it breaks.
    pub fn with<R>(&self, read: impl FnOnce(&S, Freshness) -> R) -> Option<R> {
        // After a panic within a batch the state cannot be trusted, so it is not shown.
        let shown = self.0.shown.read().ok()?;
        shown.as_ref().map(|shown| read(&shown.folded.state, shown.freshness()))
    }

    #[must_use]
    pub fn freshness(&self) -> Option<Freshness> {
        self.with(|_, freshness| freshness)
    }

    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Freshness>> {
        self.0.freshness.subscribe()
    }

    /// The last progress of a running rebuild. Until it has reached the ledger's end, the state is
    /// as fresh as possible.
    #[must_use]
    pub fn rebuild_progress_at(&self) -> Option<Instant> {
        *self.0.rebuild_progress_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_rebuild(&self, at: Option<Instant>) {
        *self.0.rebuild_progress_at.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    pub(super) fn begin(&self, folded: Folded<S>) {
        self.set_rebuild(None);
        self.replace(Some(VisibleState { folded, as_of: None }));
    }

    /// Replaces the state by one of the same ledger at the same or a later sequence. It keeps
    /// `as_of`: the new state contains as much.
    pub(super) fn renew(&self, folded: Folded<S>) {
        let as_of = self.freshness().and_then(|freshness| freshness.as_of);
        self.replace(Some(VisibleState { folded, as_of }));
    }

    pub(super) fn clear(&self) {
        self.replace(None);
    }

    fn replace(&self, shown: Option<VisibleState<S>>) {
        let freshness = shown.as_ref().map(VisibleState::freshness);
        *self.0.shown.write().unwrap_or_else(PoisonError::into_inner) = shown;
        self.0.freshness.send_replace(freshness);
    }

    /// Adds the next batch. An empty view stays empty.
    pub(super) fn add(&self, entry: Entry) -> Result<(), ProjectionError> {
        // before the ledger's end, no reader uses the state
        let is_read = self.freshness().is_some_and(|freshness| freshness.as_of.is_some());
        if !is_read || entry.facts.len() <= FACTS_UNDER_LOCK {
            return self.change(|shown| shown.folded.add(entry));
        }
        let Some(mut folded) = self.folded() else { return Ok(()) };
        let added = folded.add(entry);
        // only the fold changes the state; the old one is dropped after the lock
        self.change(|shown| {
            std::mem::swap(&mut shown.folded, &mut folded);
            added
        })
    }

    /// Notes that the state contains all batches committed before `as_of`.
    pub(super) fn caught_up(&self, as_of: DateTime<Utc>) -> Result<(), ProjectionError> {
        self.set_rebuild(None);
        self.change(|shown| {
            shown.as_of = shown.as_of.max(Some(as_of));
            Ok(())
        })
    }

    /// Changes the shown state. After an error the view shows nothing.
    fn change(
        &self,
        change: impl FnOnce(&mut VisibleState<S>) -> Result<(), ProjectionError>,
    ) -> Result<(), ProjectionError> {
        let (freshness, changed) = {
            let mut place = self.0.shown.write().unwrap_or_else(PoisonError::into_inner);
            let Some(shown) = place.as_mut() else { return Ok(()) };
            let changed = change(shown);
            if changed.is_err() {
                *place = None;
            }
            (place.as_ref().map(VisibleState::freshness), changed)
        };
        self.0.freshness.send_replace(freshness);
        changed
    }

    /// A copy of the state, which shares its large parts. Costs a pointer for each of them.
    pub(super) fn folded(&self) -> Option<Folded<S>> {
        self.0.shown.read().ok()?.as_ref().map(|shown| shown.folded.clone())
    }

    /// Notes that a snapshot of this state was saved.
    pub(super) fn saved(&self, sequence: i64) -> Result<(), ProjectionError> {
        self.change(|shown| {
            shown.folded.saved(sequence);
            Ok(())
        })
    }
}

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
