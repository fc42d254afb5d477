//! Selects the license that signs the requests.

use chrono::{DateTime, Utc};
use tracing::debug;
use uuid::Uuid;

use crate::coderd::LicenseRow;
use crate::license::{LicenseError, PublicKeys, VerifiedLicense, pick_publishing_license};

/// The license that signs, with its token. The token is only in memory, for a round and the
/// requests that begin in it. `Debug` omits it.
pub struct SigningLicense {
    /// coderd's id of the license.
    pub id: i32,
    pub jwt: String,
    /// The SHA-256 of the token; it may be stored.
    pub jwt_sha256: [u8; 32],
}

impl std::fmt::Debug for SigningLicense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningLicense")
            .field("id", &self.id)
            .field("jwt", &"***")
            .finish_non_exhaustive()
    }
}

/// Why no license signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoLicense {
    /// No license in coderd allows publishing.
    None,
    /// A license would allow it, but is for other deployments.
    OtherDeployment(String),
}

/// The license under which coderd would publish now, for the deployment with coderd's own id.
/// `rows` are in order of their ids; those that do not verify are left out.
pub fn signing_license(
    rows: Vec<LicenseRow>,
    keys: &PublicKeys,
    deployment: Uuid,
    now: DateTime<Utc>,
) -> Result<SigningLicense, NoLicense> {
    let verified = rows.into_iter().filter_map(|row| match keys.verify(&row.jwt) {
        Ok(license) => Some((row, license)),
        Err(error) => {
            debug!(license_id = row.id, %error, "license skipped");
            None
        }
    });
    let (own, foreign): (Vec<_>, Vec<_>) =
        verified.partition(|(_, license)| license.claims.is_for(deployment));
    if let Some((row, license)) = publishing(own, now) {
        return Ok(SigningLicense { id: row.id, jwt: row.jwt, jwt_sha256: license.jwt_sha256 });
    }
    Err(publishing(foreign, now).map_or(NoLicense::None, |(row, license)| {
        let error =
            LicenseError::OtherDeployment { named: license.claims.deployment_ids, deployment };
        NoLicense::OtherDeployment(format!("license {}: {error}", row.id))
    }))
}

/// Selects the license that signs.
fn publishing(
    mut licenses: Vec<(LicenseRow, VerifiedLicense)>,
    now: DateTime<Utc>,
) -> Option<(LicenseRow, VerifiedLicense)> {
    let candidates =
        licenses.iter().enumerate().map(|(index, (_, license))| (index, &license.claims));
    let (index, _) = pick_publishing_license(candidates, now)?;
    Some(licenses.swap_remove(index))
}
