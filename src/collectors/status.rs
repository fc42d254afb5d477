//! The state of collecting.

use std::sync::{Arc, Mutex, PoisonError};

/// The state of collecting, for display; clones share it.
#[derive(Clone, Debug, Default)]
pub struct CollectorStatus(Arc<Mutex<String>>);

impl CollectorStatus {
    /// The state in words; empty before it begins.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, words: &str) {
        words.clone_into(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
