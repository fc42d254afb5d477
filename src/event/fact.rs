//! The facts that a fold reads.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::envelope::Event;

/// One fact of the ledger, in ledger order.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// A deployment is introduced, once and before its other facts.
    Introduced {
        deployment: Uuid,
        /// Histograms observe builds that completed at or after this instant.
        introduced_at: DateTime<Utc>,
    },
    /// Regular creations before collection began.
    Baseline {
        deployment: Uuid,
        /// Names of organization, template and preset.
        series: [String; 3],
        /// The number of creations.
        creations: u64,
    },
    /// An accepted event. At most one build of a workspace is its first successful start, even if
    /// the source reported a later one.
    Event(Event),
    /// A license appeared in the deployment or disappeared from it.
    License {
        deployment: Uuid,
        /// coderd's own id, which orders the licenses.
        license_id: i32,
        /// SHA-256 of the token, which identifies the license.
        jwt_sha256: [u8; 32],
        /// Whether coderd has the license from now on.
        present: bool,
        /// The claims in the ledger; absent for a token that is not valid, and for a license that
        /// disappeared.
        claims: Option<serde_json::Value>,
    },
    /// An operator has corrected an accepted event.
    Corrected {
        deployment: Uuid,
        /// The event until now; none: it was corrected to nothing.
        before: Option<Box<Event>>,
        /// The event from now on; none: coderd does not have it.
        after: Option<Box<Event>>,
    },
}

impl Fact {
    #[must_use]
    pub fn deployment(&self) -> Uuid {
        match self {
            Fact::Introduced { deployment, .. }
            | Fact::Baseline { deployment, .. }
            | Fact::License { deployment, .. }
            | Fact::Corrected { deployment, .. } => *deployment,
            Fact::Event(event) => event.deployment,
        }
    }
}
