//! What a fold reads.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::Event;

/// One fact of the ledger, in its order.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// A deployment was introduced: once, before anything else of it.
    Introduced {
        deployment: Uuid,
        /// Histograms observe what completed at or after this instant.
        introduced_at: DateTime<Utc>,
    },
    /// Regular creations from before collection began.
    Baseline {
        deployment: Uuid,
        /// Organization, template and preset name.
        series: [String; 3],
        /// How many there were.
        creations: u64,
    },
    /// An accepted event. Of a workspace's builds at most one is its first successful start, whatever the
    /// source reported of a later one.
    Event(Event),
    /// A license came to the deployment or went from it.
    License {
        deployment: Uuid,
        /// coderd's own id: licenses are judged in its order.
        license_id: i32,
        /// SHA-256 of the token: which license it is.
        jwt_sha256: [u8; 32],
        /// Whether it is there from now on.
        present: bool,
        /// Its claims as the ledger has them; absent for a token that did not verify, and for one that went.
        claims: Option<serde_json::Value>,
    },
}

impl Fact {
    /// Whose fact it is.
    #[must_use]
    pub fn deployment(&self) -> Uuid {
        match self {
            Fact::Introduced { deployment, .. } | Fact::Baseline { deployment, .. } | Fact::License { deployment, .. } => *deployment,
            Fact::Event(event) => event.deployment,
        }
    }
}
