//! From the ledger's facts to those that the stages read.

use crate::ledger;
use crate::stages;

/// The stages' form of a fact.
pub(super) fn fact(fact: ledger::Fact) -> Result<stages::Fact, String> {
    Ok(match fact {
        ledger::Fact::Introduced { deployment, introduced_at } => stages::Fact::Introduced { deployment, introduced_at },
        ledger::Fact::Baseline { deployment, series, creations } => {
            let creations = u64::try_from(creations).map_err(|_| format!("a baseline of {creations} creations"))?;
            stages::Fact::Baseline { deployment, series, creations }
        }
        ledger::Fact::Event(event) => stages::Fact::Event(event),
        ledger::Fact::License { deployment, license_id, jwt_sha256, present, claims } => {
            let jwt_sha256 = <[u8; 32]>::try_from(jwt_sha256).map_err(|bytes| format!("a license hash of {} bytes", bytes.len()))?;
            let claims =
                claims.map(serde_json::from_value).transpose().map_err(|error| format!("the claims of license {license_id}: {error}"))?;
            stages::Fact::License { deployment, license_id, jwt_sha256, present, claims }
        }
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn license(jwt_sha256: Vec<u8>, claims: Option<serde_json::Value>) -> ledger::Fact {
        ledger::Fact::License { deployment: Uuid::nil(), license_id: 7, jwt_sha256, present: true, claims }
    }

    #[test]
    fn what_this_version_cannot_read_is_named() {
        let unknown = serde_json::json!({ "no_such_claim": 1 });
        assert!(fact(license(vec![0; 32], Some(unknown))).unwrap_err().starts_with("the claims of license 7: unknown field"));
        assert_eq!(fact(license(vec![0; 31], None)).unwrap_err(), "a license hash of 31 bytes");
        let series = [(); 3].map(|()| String::new());
        let negative = ledger::Fact::Baseline { deployment: Uuid::nil(), series, creations: -1 };
        assert_eq!(fact(negative).unwrap_err(), "a baseline of -1 creations");
    }

    #[test]
    fn a_license_that_did_not_verify_has_no_claims() {
        assert!(matches!(fact(license(vec![9; 32], None)), Ok(stages::Fact::License { claims: None, jwt_sha256: [9, ..], .. })));
    }
}
