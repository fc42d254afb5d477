//! License tokens: unchanged ones, and any content with a valid signature.

use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use tallyline::license::{
    LicenseClaims, LicenseError, PublicKeys, RuleSet, entitlements, pick_publishing_license,
};
use tallyline_sim::coderd::Signer;

/// Made for this test; it signs nothing else.
const SECRET: [u8; 32] = [
    0x77, 0x05, 0x8d, 0x8a, 0x40, 0xc7, 0xf5, 0x26, 0x20, 0xa8, 0x37, 0xac, 0x61, 0xfe, 0x09, 0x6d,
    0x50, 0x98, 0x72, 0xd3, 0xd7, 0xfb, 0x5b, 0x7b, 0x2a, 0x8b, 0xde, 0xa4, 0x7d, 0x6d, 0xf2, 0x06,
];
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
    assert!(
        verified.is_err() || SIGNED.iter().any(|signed| signed == input),
        "a tampered token is accepted"
    );
    verified.is_ok()
}

/// A line with the header, then the claims. The test signs any of them.
pub fn claims(input: &[u8]) -> bool {
    let at = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let signer = Signer::new(SECRET, "test").expect("a key pair");
    let token = signer.sign_parts(&input[..at], input.get(at + 1..).unwrap_or_default());
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
    let json = serde_json::to_string(claims).expect("JSON");
    assert!(!json.contains("\\u0000"), "PostgreSQL's jsonb refuses NUL");
    assert_eq!(serde_json::from_str::<LicenseClaims>(&json).expect("readable").to_owned(), *claims);
    let ends: [DateTime<Utc>; 4] = [
        DateTime::UNIX_EPOCH,
        claims.not_before,
        claims.expires_at,
        "9999-12-31T23:59:59Z".parse().expect("a time"),
    ];
    for now in ends {
        for rules in [RuleSet::Y2025M07, RuleSet::Y2026M02] {
            let answer = entitlements(rules, std::slice::from_ref(claims), now, |_, _| u64::MAX);
            assert_eq!(answer.has_license, claims.validity(now).counts());
        }
        let publishes = claims.validity(now).counts()
            && claims.publish_usage_data
            && claims.account_type == "salesforce";
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
        let tokens = crate::corpus("license_token")
            .into_iter()
            .map(|token| String::from_utf8(token).expect("text"));
        tokens.into_iter().find(|token| KEYS.verify(token).is_ok()).expect("a good token")
    });
    let text = String::from_utf8_lossy(input);
    let mut keys = PublicKeys::new();
    let added = keys.add("test", &text);
    assert_eq!(keys.len(), usize::from(added.is_ok()));
    if let Err(error) = &added {
        assert!(error.to_string().contains("test"), "the key's name is reported: {error}");
        assert!(
            text.trim().len() < 20 || !error.to_string().contains(text.trim()),
            "the key itself is not named"
        );
    }
    let judged = keys.verify(&TOKEN);
    assert!(
        added.is_err() || matches!(judged, Ok(_) | Err(LicenseError::BadSignature(_))),
        "{judged:?}"
    );
    added.is_ok()
}
