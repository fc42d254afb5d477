//! Time is passed in: a [`Clock`] is made in `main` (or in a test) and handed down.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};

/// Where the time comes from. PostgreSQL keeps microseconds, so that is how fine every instant is.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clock, shifted: a process can be given a clock step.
    System {
        /// Added to the machine's time.
        offset: TimeDelta,
    },
    /// Stands still until it is set: microseconds since the Unix epoch. For tests and simulations.
    Given(Arc<AtomicI64>),
}

impl Clock {
    /// The machine's own time.
    #[must_use]
    pub fn system() -> Self {
        Clock::System { offset: TimeDelta::zero() }
    }

    /// A clock that stands at `at` until [`Clock::set`].
    #[must_use]
    pub fn given(at: DateTime<Utc>) -> Self {
        Clock::Given(Arc::new(AtomicI64::new(at.timestamp_micros())))
    }

    /// The time now, in whole microseconds.
    ///
    /// # Panics
    /// Never for a machine whose clock lies within chrono's range.
    #[must_use]
    #[allow(clippy::disallowed_methods)]
    pub fn now(&self) -> DateTime<Utc> {
        match self {
            Clock::System { offset } => (Utc::now() + *offset).trunc_subsecs(6),
            Clock::Given(at) => DateTime::from_timestamp_micros(at.load(Ordering::SeqCst)).expect("set from a valid instant"),
        }
    }

    /// Moves a given clock. A system clock is not moved.
    pub fn set(&self, to: DateTime<Utc>) {
        if let Clock::Given(at) = self {
            at.store(to.timestamp_micros(), Ordering::SeqCst);
        }
    }
}
