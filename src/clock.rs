//! Time is passed in: `main` or a test creates a [`Clock`] and hands it down.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};

/// The source of the time. Every instant has the resolution of PostgreSQL, one microsecond.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clock with an offset, which simulates a clock step.
    System {
        /// Added to the machine's time.
        offset: TimeDelta,
    },
    /// A time that changes only by [`Clock::set`], in microseconds since the Unix epoch. For tests
    /// and simulations.
    Manual(Arc<AtomicI64>),
}

impl Clock {
    /// The machine's time without an offset.
    #[must_use]
    pub fn system() -> Self {
        Clock::System { offset: TimeDelta::zero() }
    }

    /// A clock that shows `at` until [`Clock::set`].
    #[must_use]
    pub fn manual(at: DateTime<Utc>) -> Self {
        Clock::Manual(Arc::new(AtomicI64::new(at.timestamp_micros())))
    }

    /// The current time, in whole microseconds.
    ///
    /// # Panics
    /// Only if the machine's clock is outside chrono's range.
    #[must_use]
    #[allow(clippy::disallowed_methods)]
    pub fn now(&self) -> DateTime<Utc> {
        match self {
            Clock::System { offset } => (Utc::now() + *offset).trunc_subsecs(6),
            Clock::Manual(at) => DateTime::from_timestamp_micros(at.load(Ordering::SeqCst))
                .expect("set from a valid instant"),
        }
    }

    /// Sets a manual clock. It does not change a system clock.
    pub fn set(&self, to: DateTime<Utc>) {
        if let Clock::Manual(at) = self {
            at.store(to.timestamp_micros(), Ordering::SeqCst);
        }
    }
}
