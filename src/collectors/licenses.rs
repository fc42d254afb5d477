//! Changes of coderd's licenses.

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::settings::CollectError;
use crate::coderd::LicenseRow;
use crate::ledger::{Lease, Ledger, LicenseChange, LicenseState, licenses};
use crate::license::PublicKeys;

/// The keys and the deployment against which licenses are verified.
#[derive(Clone, Copy)]
pub(super) struct LicenseVerifier<'a> {
    pub keys: &'a PublicKeys,
    /// coderd's own id.
    pub deployment: Uuid,
}

/// The changes that are not recorded yet. Verifies a token in each pass: a key that is configured
/// later makes it valid.
pub(super) fn changes(
    known: &[LicenseChange],
    rows: &[LicenseRow],
    verifier: LicenseVerifier<'_>,
) -> Vec<LicenseChange> {
    let now: Vec<LicenseChange> = rows.iter().map(|row| verifier.verify(row)).collect();
    let gone =
        known.iter().filter(|known| now.iter().all(|now| now.jwt_sha256 != known.jwt_sha256));
    let gone = gone.map(|known| LicenseChange { state: LicenseState::Gone, ..known.clone() });
    let new = now.iter().filter(|now| !known.contains(now)).cloned();
    gone.chain(new).collect()
}

/// Records the changes since `known` and returns the present licenses.
///
/// Before it writes, it rereads the ledger's own state: the answer to an earlier record may be
/// lost. Changes are rare.
pub(super) async fn record(
    ledger: &Ledger,
    lease: &Lease,
    source_id: i16,
    known: &[LicenseChange],
    rows: &[LicenseRow],
    verifier: LicenseVerifier<'_>,
) -> Result<Vec<LicenseChange>, CollectError> {
    if changes(known, rows, verifier).is_empty() {
        return Ok(known.to_vec());
    }
    let changes = changes(
        &ledger.run(async |conn| licenses::present(conn, source_id).await).await?,
        rows,
        verifier,
    );
    ledger
        .run(async |conn| {
            licenses::record(conn, lease, source_id, &changes, ledger.clock.now()).await
        })
        .await?;
    for change in &changes {
        match &change.state {
            LicenseState::Verified(_) => {
                tracing::info!(license_id = change.license_id, "license verified")
            }
            LicenseState::Refused(reason) => {
                tracing::warn!(license_id = change.license_id, reason, "license refused")
            }
            LicenseState::Gone => {
                tracing::info!(license_id = change.license_id, "license removed from coderd")
            }
        }
    }
    Ok(rows.iter().map(|row| verifier.verify(row)).collect())
}

impl LicenseVerifier<'_> {
    fn verify(self, row: &LicenseRow) -> LicenseChange {
        let verified =
            self.keys.verify_for(&row.jwt, self.deployment).map_err(|error| error.to_string());
        let state = match verified.and_then(|license| {
            serde_json::to_value(&license.claims).map_err(|error| error.to_string())
        }) {
            Ok(claims) => LicenseState::Verified(claims),
            Err(refusal) => LicenseState::Refused(refusal),
        };
        let jwt_sha256 = Sha256::digest(row.jwt.as_bytes()).into();
        LicenseChange {
            license_id: row.id,
            jwt_sha256,
            uploaded_at: row.uploaded_at.instant(),
            state,
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn row(id: i32, jwt: &str) -> LicenseRow {
        let at = DateTime::from_timestamp(0, 0).unwrap();
        LicenseRow { id, uploaded_at: at.into(), jwt: jwt.into() }
    }

    #[test]
    fn a_license_is_recorded_when_it_appears_and_when_it_disappears() {
        let verifier = LicenseVerifier { keys: &PublicKeys::new(), deployment: Uuid::nil() };
        let first = changes(&[], &[row(1, "a.b.c")], verifier);
        assert!(matches!(
            first.as_slice(),
            [LicenseChange { license_id: 1, state: LicenseState::Refused(_), .. }]
        ));
        assert!(changes(&first, &[row(1, "a.b.c")], verifier).is_empty());
        let second = changes(&first, &[row(2, "d.e.f")], verifier);
        assert_eq!(second.iter().map(|change| change.license_id).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(second[0].state, LicenseState::Gone);
    }

    #[test]
    fn a_refusal_never_contains_the_token() {
        let jwt = "header.secretsecret.signature";
        let verifier = LicenseVerifier { keys: &PublicKeys::new(), deployment: Uuid::nil() };
        for change in changes(&[], &[row(1, jwt)], verifier) {
            assert!(!format!("{change:?}").contains("secretsecret"));
        }
    }
}
