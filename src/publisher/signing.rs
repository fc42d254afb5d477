//! Which license signs the requests.

use chrono::{DateTime, Utc};
use tracing::debug;
use uuid::Uuid;

use crate::coderd::LicenseRow;
use crate::license::{LicenseError, PublicKeys, VerifiedLicense, pick_publishing_license};

/// The license that signs, with its token. The token is kept no longer than a request needs it, and `Debug` leaves it out.
pub struct SigningLicense {
    /// coderd's id of the license.
    pub id: i32,
    /// The token itself.
    pub jwt: String,
    /// Its SHA-256, which may be kept.
    pub jwt_sha256: [u8; 32],
}

impl std::fmt::Debug for SigningLicense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningLicense").field("id", &self.id).field("jwt", &"***").finish_non_exhaustive()
    }
}

/// Why no license signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoLicense {
    /// None of coderd's licenses allows publishing.
    None,
    /// Those that would allow it were issued for other deployments.
    OtherDeployment(String),
}

/// The license under which coderd itself would publish now, for the deployment with coderd's own id. `rows` come in the order of their
/// ids; one that does not verify is left out.
///
/// # Errors
/// [`NoLicense`]
pub fn signing_license(
    rows: Vec<LicenseRow>,
    keys: &PublicKeys,
    deployment: Uuid,
    now: DateTime<Utc>,
) -> Result<SigningLicense, NoLicense> {
    let mut foreign = Vec::new();
    let mut verified: Vec<(LicenseRow, VerifiedLicense)> = Vec::new();
    for row in rows {
        match keys.verify_for(&row.jwt, deployment) {
            Ok(license) => verified.push((row, license)),
            Err(error) => {
                debug!(license_id = row.id, %error, "license left out");
                if matches!(error, LicenseError::OtherDeployment { .. }) {
                    foreign.push(format!("license {}: {error}", row.id));
                }
            }
        }
    }
    let candidates = verified.iter().enumerate().map(|(index, (_, license))| (index, &license.claims));
    let picked = pick_publishing_license(candidates, now).map(|(index, _)| index);
    match picked.map(|index| verified.swap_remove(index)) {
        Some((row, license)) => Ok(SigningLicense { id: row.id, jwt: row.jwt, jwt_sha256: license.jwt_sha256 }),
        None if foreign.is_empty() => Err(NoLicense::None),
        None => Err(NoLicense::OtherDeployment(foreign.join("; "))),
    }
}
