//! The next change of a license's validity.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::ledger::{LicenseChange, LicenseState};
use crate::license::{LicenseClaims, Validity};

/// The next instant at which a license becomes or ceases to be effective, or its grace period
/// begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LicenseEdge {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// Time of the change.
    pub at: DateTime<Utc>,
    /// coderd's own id of the license.
    pub license_id: i32,
    /// Description of the change.
    pub what: String,
}

/// The first change after `now` among verified licenses in coderd.
pub(super) fn next_edge(
    deployment_id: Uuid,
    licenses: &[LicenseChange],
    now: DateTime<Utc>,
) -> Option<LicenseEdge> {
    let edges = licenses.iter().filter_map(|license| {
        let LicenseState::Verified(claims) = &license.state else { return None };
        let claims: LicenseClaims = serde_json::from_value(claims.clone()).ok()?;
        let (at, validity) = claims.next_edge(now)?;
        Some(LicenseEdge {
            deployment_id,
            at,
            license_id: license.license_id,
            what: description(validity).to_owned(),
        })
    });
    edges.min_by_key(|edge| (edge.at, edge.license_id))
}

fn description(validity: Validity) -> &'static str {
    match validity {
        Validity::Valid => "it becomes effective",
        Validity::InGrace => "its paid term ends, and its grace period begins",
        Validity::Expired => "it expires",
        Validity::NotYetValid | Validity::TermTooLong => "it ceases to be effective",
    }
}
