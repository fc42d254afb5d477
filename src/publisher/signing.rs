//! Which license signs the requests.

use chrono::{DateTime, Utc};
use tracing::debug;

use crate::coderd::LicenseRow;
use crate::license::{PublicKeys, VerifiedLicense, pick_publishing_license};

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

/// The license under which coderd itself would publish now, if there is one. `rows` come in the order of their ids; one that does not
/// verify is left out.
pub fn signing_license(rows: Vec<LicenseRow>, keys: &PublicKeys, now: DateTime<Utc>) -> Option<SigningLicense> {
    let verified: Vec<(LicenseRow, VerifiedLicense)> = rows
        .into_iter()
        .filter_map(|row| match keys.verify(&row.jwt) {
            Ok(license) => Some((row, license)),
            Err(error) => {
                debug!(license_id = row.id, %error, "license left out");
                None
            }
        })
        .collect();
    let candidates = verified.iter().enumerate().map(|(index, (_, license))| (index, &license.claims));
    let (index, _) = pick_publishing_license(candidates, now)?;
    let (row, license) = verified.into_iter().nth(index)?;
    Some(SigningLicense { id: row.id, jwt: row.jwt, jwt_sha256: license.jwt_sha256 })
}
