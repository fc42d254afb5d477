//! The state of a simulated Tallyman, which its requests share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tallyline::clock::Clock;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::books::Bookkeeping;
use super::switches::{Running, Switches};

/// The configuration and the state, in all requests.
pub struct Shared {
    pub license_keys: Vec<String>,
    pub deployment_ids: Vec<Uuid>,
    pub clock: Clock,
    pub stop: CancellationToken,
    pub state: Mutex<ServerState>,
}

/// The state that requests change.
pub struct ServerState {
    pub books: Bookkeeping,
    pub running: Running,
}

impl Shared {
    pub fn state(&self) -> MutexGuard<'_, ServerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Misbehaves from now on by `switches`. The error is the mistake in them.
    pub fn set_switches(&self, switches: Switches) -> Result<(), String> {
        match switches.mistake() {
            Some(mistake) => Err(mistake),
            None => {
                self.state().running = Running::new(switches);
                Ok(())
            }
        }
    }
}
