//! The condition of a publisher, for display.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, SecondsFormat, Utc};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::clock::Clock;
use crate::ledger::{PublishRefusal, Recovering};

/// The condition of one source's publisher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Before the first cycle.
    Starting,
    /// Its cycles succeed.
    Working,
    /// No coderd database is configured. Without a license and a last check, nothing is published.
    /// Healthy.
    NoDatabase,
    /// The source is not introduced yet. Healthy.
    NotIntroduced,
    /// An operator has retired the source: who and why. Healthy.
    Retired(String),
    /// No license in coderd allows publishing, so nothing is published. coderd itself would not
    /// publish either. Healthy.
    NoLicense,
    /// An operator has paused publishing: who and why. Healthy.
    Paused(String),
    /// The ledger was restored from a backup and does not know which events were sent since.
    /// Nothing is published until it has caught up.
    Recovering(String),
    /// coderd does not belong to this source, or its license is for another deployment. Until this
    /// is corrected, nothing is sent or settled.
    Refused(String),
    /// Findings of an audit hold all usage of the source, or of all sources: why, and what ends the
    /// hold.
    Held(String),
    /// The last cycle failed; the publisher retries.
    Failing(String),
    /// coderd itself publishes. Nothing is sent until an operator confirms that coderd's publishing
    /// is cut off.
    Stopped(String),
}

impl Condition {
    /// Whether this condition needs no operator.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        !matches!(
            self,
            Condition::Refused(_)
                | Condition::Recovering(_)
                | Condition::Held(_)
                | Condition::Failing(_)
                | Condition::Stopped(_)
        )
    }
}

pub(super) fn recovering(recovery: &Recovering) -> Condition {
    let since = recovery.opened_at.to_rfc3339_opts(SecondsFormat::Secs, true);
    Condition::Recovering(format!(
        "the ledger was restored from a backup (detected at {since}) and has not caught up: `tallyline status` shows the remaining work"
    ))
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Condition::Starting => f.write_str("starting"),
            Condition::Working => f.write_str("working"),
            Condition::NoDatabase => f.write_str(
                "nothing is published: no coderd database is configured for this source",
            ),
            Condition::NotIntroduced => {
                f.write_str("nothing is published: no collector has registered this source yet")
            }
            Condition::NoLicense => {
                f.write_str("nothing is published: no license in coderd allows it")
            }
            Condition::Retired(why) | Condition::Paused(why) => {
                write!(f, "nothing is published: {why}")
            }
            Condition::Refused(why) => write!(f, "refused: {why}"),
            Condition::Recovering(why) => write!(f, "held: {why}"),
            Condition::Held(why) => write!(f, "held: {why}"),
            Condition::Failing(why) => write!(f, "failing: {why}"),
            Condition::Stopped(why) => write!(f, "stopped: {why}"),
        }
    }
}

/// The current condition; clones share it.
#[derive(Clone, Debug)]
pub struct ConditionHandle {
    /// None: the publisher does not know its source yet.
    source: Option<Uuid>,
    sole: bool,
    clock: Clock,
    now: Arc<Mutex<(Condition, DateTime<Utc>)>>,
}

impl ConditionHandle {
    pub(super) fn new(source: Uuid, sole: bool, clock: Clock) -> Self {
        let now = Arc::new(Mutex::new((Condition::Starting, clock.now())));
        ConditionHandle { source: Some(source), sole, clock, now }
    }

    /// For a publisher in mode `sole` that does not start.
    #[must_use]
    pub fn refused(source: Option<Uuid>, why: String, clock: Clock) -> Self {
        let now = Arc::new(Mutex::new((Condition::Refused(why), clock.now())));
        ConditionHandle { source, sole: true, clock, now }
    }

    /// The publisher's source, if it is known.
    #[must_use]
    pub fn source(&self) -> Option<Uuid> {
        self.source
    }

    /// Whether usage leaves through this publisher. None: not certain, or its mode sends nothing.
    #[must_use]
    pub fn publishes(&self) -> Option<bool> {
        match self.get() {
            Condition::Stopped(_) | Condition::Refused(_) => Some(false),
            Condition::Working if self.sole => Some(true),
            _ => None,
        }
    }

    #[must_use]
    pub fn get(&self) -> Condition {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Why the publisher refuses to work, if it does.
    #[must_use]
    pub fn refusal(&self) -> Option<PublishRefusal> {
        let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let (Condition::Refused(why), since) = &*now else { return None };
        Some(PublishRefusal { deployment_id: self.source, why: why.clone(), since: *since })
    }

    /// Logs each change once.
    pub(super) fn set(&self, condition: Condition) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if now.0 == condition {
            return;
        }
        let source = self.source.map(tracing::field::display);
        match &condition {
            Condition::Recovering(_) | Condition::Failing(_) => {
                warn!(source, %condition, "publisher")
            }
            Condition::Refused(_) | Condition::Held(_) | Condition::Stopped(_) => {
                error!(source, %condition, "publisher")
            }
            _ => info!(source, %condition, "publisher"),
        }
        *now = (condition, self.clock.now());
    }
}
