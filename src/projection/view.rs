//! How readers see a state while it is folded on.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Folded, ProjectionError};
use crate::ledger::{Entry, Sequence};
use crate::stages::Stage;

/// Up to where a state is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The last batch in the state.
    pub sequence: Sequence,
    /// Whatever was committed before this instant is in the state. Absent until the ledger's end was first reached.
    pub as_of: Option<DateTime<Utc>>,
}

/// A reader's handle on a state; clones see the same.
///
/// The state stands behind one lock, because a copy for each batch would be too dear with a million events. It is written one batch at a
/// time, so that a reader sees whole batches only and waits for one at most.
pub struct View<S>(Arc<Shared<S>>);

struct Shared<S> {
    shown: RwLock<Option<Shown<S>>>,
    standing: watch::Sender<Option<Standing>>,
    rebuild_went_on: Mutex<Option<Instant>>,
}

struct Shown<S> {
    folded: Folded<S>,
    as_of: Option<DateTime<Utc>>,
}

impl<S> Shown<S> {
    fn standing(&self) -> Standing {
        Standing { sequence: self.folded.sequence, as_of: self.as_of }
    }
}

impl<S> Clone for View<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Stage> View<S> {
    pub(super) fn empty() -> Self {
        Self(Arc::new(Shared { shown: RwLock::new(None), standing: watch::Sender::new(None), rebuild_went_on: Mutex::default() }))
    }

    /// What `read` makes of the state, which stands still meanwhile: be short. Nothing before the fold has begun, nor after it broke.
    pub fn with<R>(&self, read: impl FnOnce(&S, Standing) -> R) -> Option<R> {
        // After a panic within a batch the state is not to be trusted: as if there were none.
        let shown = self.0.shown.read().ok()?;
        shown.as_ref().map(|shown| read(&shown.folded.state, shown.standing()))
    }

    /// Up to where the state is true.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        self.with(|_, standing| standing)
    }

    /// Hears of each change of the standing.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Standing>> {
        self.0.standing.subscribe()
    }

    /// When a rebuild last went on, while one is under way: until it is done and has come to the ledger's end, the state is as new as can be had.
    #[must_use]
    pub fn rebuild_went_on(&self) -> Option<Instant> {
        *self.0.rebuild_went_on.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_rebuild(&self, went_on: Option<Instant>) {
        *self.0.rebuild_went_on.lock().unwrap_or_else(PoisonError::into_inner) = went_on;
    }

    pub(super) fn begin(&self, folded: Folded<S>) {
        self.set_rebuild(None);
        self.replace(Some(Shown { folded, as_of: None }));
    }

    /// Puts another state of the same ledger in its place, one that is as far or further. Whatever was in the state until `as_of` still is.
    pub(super) fn renew(&self, folded: Folded<S>) {
        let as_of = self.standing().and_then(|standing| standing.as_of);
        self.replace(Some(Shown { folded, as_of }));
    }

    pub(super) fn clear(&self) {
        self.replace(None);
    }

    fn replace(&self, shown: Option<Shown<S>>) {
        let standing = shown.as_ref().map(Shown::standing);
        *self.0.shown.write().unwrap_or_else(PoisonError::into_inner) = shown;
        self.0.standing.send_replace(standing);
    }

    /// Adds the batch that follows. A view that shows nothing stays so.
    pub(super) fn add(&self, entry: Entry) -> Result<(), ProjectionError> {
        self.change(|shown| shown.folded.add(entry))
    }

    /// All that was committed before `as_of` is in the state.
    pub(super) fn caught_up(&self, as_of: DateTime<Utc>) -> Result<(), ProjectionError> {
        self.set_rebuild(None);
        self.change(|shown| {
            shown.as_of = shown.as_of.max(Some(as_of));
            Ok(())
        })
    }

    /// Changes what is shown; if that fails, nothing is shown any more.
    fn change(&self, change: impl FnOnce(&mut Shown<S>) -> Result<(), ProjectionError>) -> Result<(), ProjectionError> {
        let (standing, changed) = {
            let mut place = self.0.shown.write().unwrap_or_else(PoisonError::into_inner);
            let Some(shown) = place.as_mut() else { return Ok(()) };
            let changed = change(shown);
            if changed.is_err() {
                *place = None;
            }
            (place.as_ref().map(Shown::standing), changed)
        };
        self.0.standing.send_replace(standing);
        changed
    }

    pub(super) fn folded<R>(&self, read: impl FnOnce(&Folded<S>) -> R) -> Option<R> {
        self.0.shown.read().ok()?.as_ref().map(|shown| read(&shown.folded))
    }
}
