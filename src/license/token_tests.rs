//! Tests with tokens signed by a key of these tests.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use chrono::{DateTime, TimeDelta, Utc};
use proptest::prelude::*;
use ring::hmac;
use ring::signature::Ed25519KeyPair;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};

use super::*;

/// Generated for these tests. It signs nothing else.
const PRIVATE_KEY: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIHcFjYpAx/UmIKg3rGH+CW1QmHLT1/tbeyqL3qR9bfIG
-----END PRIVATE KEY-----";
const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAZZ029Oih6p0jeHrj1ZAVopIBfpoBDirQzuqaWb3pA7I=
-----END PUBLIC KEY-----";
const PUBLIC_KEY_BASE64: &str = "ZZ029Oih6p0jeHrj1ZAVopIBfpoBDirQzuqaWb3pA7I=";
const OTHER_PRIVATE_KEY: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEICTLCwccevtUm8i6pneUwtFvKkyn0YvqtzAcaWN7bGt3
-----END PRIVATE KEY-----";

fn keys() -> PublicKeys {
    let mut keys = PublicKeys::new();
    keys.add("test", PUBLIC_KEY).expect("a key");
    keys
}

fn sign_with(private_key: &str, key_id: Option<&str>, claims: &Value) -> String {
    let mut header = json!({ "typ": "JWT", "alg": "EdDSA" });
    if let Some(key_id) = key_id {
        header["kid"] = key_id.into();
    }
    let key = PrivatePkcs8KeyDer::from_pem_slice(private_key.as_bytes()).expect("a PEM");
    let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der()).expect("a key");
    signed(&header, claims, |message| key.sign(message).as_ref().to_vec())
}

fn signed(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let parts = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    let message = parts.join(".");
    let signature = URL_SAFE_NO_PAD.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}

fn sign(claims: &Value) -> String {
    sign_with(PRIVATE_KEY, Some("test"), claims)
}

fn good() -> Value {
    json!({
        "iss": "licenses", "aud": ["anyone"], "sub": 5, "jti": "license-1", "not_known": {"to": "us"},
        "iat": 1_751_328_000, "nbf": 1_751_331_600, "license_expires": 1_782_864_000, "exp": 1_785_542_400,
        "account_type": "salesforce", "account_id": "account-1", "deployment_ids": ["d1"], "trial": true,
        "feature_set": "premium", "all_features": true, "version": 3, "features": {"user_limit": 10, "managed_agent_limit_soft": -1},
        "addons": null, "require_telemetry": true, "publish_usage_data": true,
    })
}

/// The valid claims with one change; null removes the claim.
fn with(field: &str, value: Value) -> Value {
    let mut claims = good();
    match value {
        Value::Null => claims.as_object_mut().and_then(|claims| claims.remove(field)),
        value => claims.as_object_mut().and_then(|claims| claims.insert(field.to_owned(), value)),
    };
    claims
}

fn verify(claims: &Value) -> Result<LicenseClaims, LicenseError> {
    keys().verify(&sign(claims)).map(|license| license.claims)
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a time")
}

#[test]
fn a_good_token_gives_its_claims_and_hash() {
    let token = sign(&good());
    let license = keys().verify(&token).expect("good");
    assert_eq!(license.key_id, "test");
    assert_eq!(
        hex::encode(license.jwt_sha256),
        hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&token))
    );
    // the ledger stores this form permanently
    let kept = r#"{"issued_at":"2025-07-01T00:00:00Z","not_before":"2025-07-01T01:00:00Z","license_expires":"2026-07-01T00:00:00Z","expires_at":"2026-08-01T00:00:00Z","token_id":"license-1","account_type":"salesforce","account_id":"account-1","deployment_ids":["d1"],"trial":true,"feature_set":"premium","all_features":true,"features":{"managed_agent_limit_soft":-1,"user_limit":10},"addons":[],"require_telemetry":true,"publish_usage_data":true}"#;
    assert_eq!(serde_json::to_string(&license.claims).expect("JSON"), kept);
    assert_eq!(serde_json::from_str::<LicenseClaims>(kept).expect("readable"), license.claims);
}

#[test]
fn only_the_required_claims_are_required() {
    for field in ["iat", "nbf", "license_expires", "exp", "account_type", "account_id", "version"] {
        let missing = Err(LicenseError::MissingClaim(field));
        assert_eq!(verify(&with(field, Value::Null)), missing, "{field}");
        let mut null = good();
        null[field] = Value::Null;
        assert_eq!(verify(&null), missing, "{field} null");
    }
    assert_eq!(
        verify(&with("account_type", json!(""))),
        Err(LicenseError::MissingClaim("account_type"))
    );
    for field in [
        "iss",
        "aud",
        "sub",
        "jti",
        "deployment_ids",
        "trial",
        "feature_set",
        "all_features",
        "features",
        "addons",
    ] {
        assert!(verify(&with(field, Value::Null)).is_ok(), "{field}");
    }
}

#[test]
fn a_claim_of_another_type_is_named() {
    for (field, value) in [
        ("iat", json!("1751328000")),
        ("exp", json!(1e300)),
        ("nbf", json!(i64::MAX)),
        ("license_expires", json!(-1e15)),
        ("account_id", json!(5)),
        ("account_id", json!("nul\u{0}")),
        ("deployment_ids", json!("d1")),
        ("addons", json!([1])),
        ("trial", json!("yes")),
        ("features", json!({"user_limit": 1.5})),
        ("features", json!({"user_limit": u64::MAX})),
        ("features", json!([])),
        ("version", json!("3")),
        ("publish_usage_data", json!(1)),
    ] {
        let error = verify(&with(field, value.clone())).expect_err(field);
        assert!(
            matches!(error, LicenseError::InvalidClaim { field: named, .. } if named == field),
            "{field} {value}: {error:?}"
        );
    }
}

#[test]
fn a_token_of_another_version_is_refused() {
    for version in [0, 2, 4, u64::MAX] {
        assert_eq!(verify(&with("version", json!(version))), Err(LicenseError::Version(version)));
    }
    for version in [json!("3"), json!(3.5), json!(-3)] {
        assert!(matches!(
            verify(&with("version", version)),
            Err(LicenseError::InvalidClaim { field: "version", .. })
        ));
    }
}

#[test]
fn fractional_dates_are_kept_to_the_microsecond() {
    let claims = verify(&with("nbf", json!(1_751_328_000.123_456_f64))).expect("good");
    assert_eq!(claims.not_before, at("2025-07-01T00:00:00.123456Z"));
}

/// The valid token with another header is refused for its algorithm, with its signature and without
/// one.
#[track_caller]
fn refused_for_its_algorithm(header: &str, algorithm: &str) {
    let token = sign(&good());
    let [_, claims, signature]: [&str; 3] =
        token.split('.').collect::<Vec<_>>().try_into().expect("three parts");
    for signature in [signature, ""] {
        let token = format!("{}.{claims}.{signature}", URL_SAFE_NO_PAD.encode(header));
        assert_eq!(
            keys().verify(&token),
            Err(LicenseError::Algorithm(algorithm.to_owned())),
            "{header}"
        );
    }
}

#[test]
fn a_token_with_alg_none_is_refused() {
    for algorithm in ["none", "None", "NONE", ""] {
        refused_for_its_algorithm(&format!(r#"{{"alg":"{algorithm}","kid":"test"}}"#), algorithm);
    }
    refused_for_its_algorithm(r#"{"kid":"test"}"#, "");
}

#[test]
fn only_eddsa_is_accepted() {
    for algorithm in ["HS256", "eddsa", "RS256", "ES256"] {
        refused_for_its_algorithm(&format!(r#"{{"alg":"{algorithm}","kid":"test"}}"#), algorithm);
    }
    // The classic attack: the public key as the secret of a symmetric algorithm.
    let header = json!({ "typ": "JWT", "alg": "HS256", "kid": "test" });
    let secret = hmac::Key::new(hmac::HMAC_SHA256, PUBLIC_KEY.as_bytes());
    let symmetric =
        signed(&header, &good(), |message| hmac::sign(&secret, message).as_ref().to_vec());
    assert_eq!(keys().verify(&symmetric), Err(LicenseError::Algorithm("HS256".to_owned())));
}

#[test]
fn a_token_of_other_deployments_is_refused_and_one_that_names_none_is_for_any() {
    let (own, other) = (uuid::Uuid::from_u128(0xa), uuid::Uuid::from_u128(0xb));
    let verify = |named: Value| keys().verify_for(&sign(&with("deployment_ids", named)), own);
    for named in [
        json!([]),
        Value::Null,
        json!([own]),
        json!([other, own]),
        json!([own.to_string().to_uppercase()]),
    ] {
        assert!(verify(named.clone()).is_ok(), "{named}");
    }
    for named in [json!([other]), json!(["d1"]), json!([""])] {
        let refused = verify(named.clone()).expect_err("refused");
        assert!(
            matches!(refused, LicenseError::OtherDeployment { deployment, .. } if deployment == own),
            "{named}"
        );
        assert!(refused.to_string().contains(&own.to_string()), "{refused}");
    }
}

#[test]
fn a_token_of_an_unknown_kid_is_refused() {
    assert_eq!(
        keys().verify(&sign_with(PRIVATE_KEY, None, &good())),
        Err(LicenseError::MissingKeyId)
    );
    assert_eq!(
        keys().verify(&sign_with(PRIVATE_KEY, Some(""), &good())),
        Err(LicenseError::MissingKeyId)
    );
    for kid in ["else", "TEST", "test\0"] {
        let unknown = Err(LicenseError::UnknownKey(kid.to_owned()));
        assert_eq!(keys().verify(&sign_with(PRIVATE_KEY, Some(kid), &good())), unknown);
    }
}

#[test]
fn the_named_key_must_have_signed() {
    let forged = Err(LicenseError::BadSignature("test".to_owned()));
    assert_eq!(keys().verify(&sign_with(OTHER_PRIVATE_KEY, Some("test"), &good())), forged);
    assert!(PublicKeys::new().verify(&sign(&good())).is_err());
}

#[test]
fn an_oversized_token_is_refused_unread() {
    let token = "x".repeat(MAX_TOKEN_BYTES + 1);
    assert_eq!(keys().verify(&token), Err(LicenseError::TooLarge { bytes: MAX_TOKEN_BYTES + 1 }));
    assert_eq!(keys().verify(&token[1..]), Err(LicenseError::Malformed("not three parts")));
}

#[test]
fn a_public_key_is_pem_base64_or_hex() {
    let bytes = STANDARD.decode(PUBLIC_KEY_BASE64).expect("base64");
    for key in [PUBLIC_KEY, PUBLIC_KEY_BASE64, &hex::encode(bytes)] {
        let mut keys = PublicKeys::new();
        keys.add("test", &format!("\n{key}\n")).expect("a key");
        assert!(keys.verify(&sign(&good())).is_ok(), "{key}");
        assert_eq!(keys.add("test", key).expect_err("taken").reason, "named twice");
    }
    for key in ["", "abc", PRIVATE_KEY, "-----BEGIN PUBLIC KEY-----", &PUBLIC_KEY_BASE64[4..]] {
        assert!(PublicKeys::new().add("test", key).is_err(), "{key}");
    }
    assert!(PublicKeys::new().add("", PUBLIC_KEY).is_err());
}

#[test]
fn validity_is_exact_at_every_edge() {
    let claims = verify(&good()).expect("good");
    let tick = TimeDelta::microseconds(1);
    for (at, validity) in [
        (claims.not_before - tick, Validity::NotYetValid),
        (claims.not_before, Validity::Valid),
        (claims.license_expires, Validity::Valid),
        (claims.license_expires + tick, Validity::InGrace),
        (claims.expires_at - tick, Validity::InGrace),
        (claims.expires_at, Validity::Expired),
        (claims.license_expires - TimeDelta::days(5 * 365), Validity::NotYetValid),
        (claims.license_expires - TimeDelta::days(5 * 365) - tick, Validity::TermTooLong),
    ] {
        assert_eq!(claims.validity(at), validity, "{at}");
    }
    let early =
        LicenseClaims { not_before: claims.issued_at - TimeDelta::days(1), ..claims.clone() };
    assert_eq!(
        early.validity(early.issued_at - tick),
        Validity::NotYetValid,
        "used before it was issued"
    );
}

#[test]
fn the_older_flag_means_enterprise_only_without_a_set() {
    let set = |feature_set: &str, all_features| {
        let claims = LicenseClaims {
            feature_set: feature_set.to_owned(),
            all_features,
            ..verify(&good()).expect("good")
        };
        claims.feature_set()
    };
    assert_eq!(set("", true), FeatureSet::Enterprise);
    assert_eq!(set("", false), FeatureSet::None);
    assert_eq!(set("premium", true), FeatureSet::Premium);
    assert_eq!(set("enterprise", false), FeatureSet::Enterprise);
    assert_eq!(set("platinum", true), FeatureSet::None);
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(token in ".{0,200}") {
        prop_assert!(keys().verify(&token).is_err());
    }

    #[test]
    fn no_three_parts_make_the_parser_panic(parts in prop::array::uniform3(prop::collection::vec(any::<u8>(), 0..60))) {
        let parts = parts.map(|part| URL_SAFE_NO_PAD.encode(part));
        prop_assert!(keys().verify(&parts.join(".")).is_err());
    }

    /// Changing any byte of a valid token makes it invalid: every byte is signed or part of the
    /// signature.
    #[test]
    fn a_tampered_token_is_refused(position: prop::sample::Index, replacement in "[ -~]") {
        let token = sign(&good());
        let at = position.index(token.len());
        let changed = format!("{}{replacement}{}", &token[..at], &token[at + 1..]);
        prop_assume!(changed != token);
        prop_assert!(keys().verify(&changed).is_err());
    }

    #[test]
    fn signed_nonsense_is_refused_without_panic(claims in prop::collection::btree_map("iat|nbf|exp|license_expires|account_id|account_type|version|features", prop_oneof![
        any::<i64>().prop_map(Value::from), any::<f64>().prop_map(Value::from), ".{0,5}".prop_map(Value::from), Just(Value::Null), Just(json!({"x": 1})),
    ], 0..8)) {
        let token = sign(&json!(claims));
        if let Ok(license) = keys().verify(&token) {
            let _ = license.claims.validity(DateTime::UNIX_EPOCH);
        }
    }
}
