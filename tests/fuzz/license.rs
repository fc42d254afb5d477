//! License tokens: unchanged ones, and any content with a valid signature.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use jsonwebtoken::{Algorithm, EncodingKey};
use tallyline::license::{LicenseClaims, LicenseError, PublicKeys, RuleSet, entitlements, pick_publishing_license};

/// Made for this test; it signs nothing else.
const PRIVATE_KEY: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIHcFjYpAx/UmIKg3rGH+CW1QmHLT1/tbeyqL3qR9bfIG
-----END PRIVATE KEY-----";
const PUBLIC_KEY: &str = "ZZ029Oih6p0jeHrj1ZAVopIBfpoBDirQzuqaWb3pA7I=";

static KEYS: LazyLock<PublicKeys> = LazyLock::new(|| {
    let mut keys = PublicKeys::new();
    keys.add("test", PUBLIC_KEY).expect("a key");
    keys
});

/// A token's text. Only an unchanged signed one is accepted: those are in the corpus.
pub fn token(input: &[u8]) -> bool {
    static SIGNED: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| crate::corpus("license_token"));
    let text = String::from_utf8_lossy(input);
    let verified = KEYS.verify(&text);
    if let Err(error) = &verified {
        refused(error, &text);
    }
    assert!(verified.is_err() || SIGNED.iter().any(|signed| signed == input), "a tampered token is accepted");
    verified.is_ok()
}

/// A line with the header, then the claims. The test signs any of them.
pub fn claims(input: &[u8]) -> bool {
    let at = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let parts = [&input[..at], input.get(at + 1..).unwrap_or_default()].map(|part| URL_SAFE_NO_PAD.encode(part));
    let message = parts.join(".");
    let key = EncodingKey::from_ed_pem(PRIVATE_KEY.as_bytes()).expect("a key");
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::EdDSA).expect("signed");
    let token = format!("{message}.{signature}");
    match KEYS.verify(&token) {
        Ok(license) => {
            assert_eq!(license.key_id, "test");
            accepted(&license.claims);
            true
        }
        Err(error) => {
            refused(&error, &token);
            assert!(!matches!(error, LicenseError::BadSignature(_)), "the signature is good");
            false
        }
    }
}

/// Checks that accepted claims survive JSON in PostgreSQL and can be judged at any instant.
fn accepted(claims: &LicenseClaims) {
    let kept = serde_json::to_string(claims).expect("JSON");
    assert!(!kept.contains("\\u0000"), "PostgreSQL's jsonb refuses NUL");
    assert_eq!(serde_json::from_str::<LicenseClaims>(&kept).expect("readable").to_owned(), *claims);
    let ends: [DateTime<Utc>; 4] =
        [DateTime::UNIX_EPOCH, claims.not_before, claims.expires_at, "9999-12-31T23:59:59Z".parse().expect("a time")];
    for now in ends {
        for rules in [RuleSet::Y2025M07, RuleSet::Y2026M02] {
            let answer = entitlements(rules, std::slice::from_ref(claims), now, |_, _| u64::MAX);
            assert_eq!(answer.has_license, claims.validity(now).counts());
        }
        let publishes = claims.validity(now).counts() && claims.publish_usage_data && claims.account_type == "salesforce";
        assert_eq!(pick_publishing_license([((), claims)], now).is_some(), publishes);
    }
}

/// Checks that a refusal has a reason and hides the token's body and signature.
fn refused(error: &LicenseError, token: &str) {
    let text = error.to_string();
    assert!(!text.is_empty());
    for part in token.split('.').skip(1).filter(|part| part.len() > 20) {
        assert!(!text.contains(part), "the token is shown");
    }
}

/// A public key as in a pipeline file. Any accepted key can judge a token.
pub fn key(input: &[u8]) -> bool {
    static TOKEN: LazyLock<String> = LazyLock::new(|| {
        let tokens = crate::corpus("license_token").into_iter().map(|token| String::from_utf8(token).expect("text"));
        tokens.into_iter().find(|token| KEYS.verify(token).is_ok()).expect("a good token")
    });
    let text = String::from_utf8_lossy(input);
    let mut keys = PublicKeys::new();
    let added = keys.add("test", &text);
    assert_eq!(keys.len(), usize::from(added.is_ok()));
    if let Err(error) = &added {
        assert!(error.to_string().contains("test"), "the key's name is told: {error}");
        assert!(text.trim().len() < 20 || !error.to_string().contains(text.trim()), "and not what stands in its place");
    }
    let judged = keys.verify(&TOKEN);
    assert!(added.is_err() || matches!(judged, Ok(_) | Err(LicenseError::BadSignature(_))), "{judged:?}");
    added.is_ok()
}
