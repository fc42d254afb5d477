//! Verifies a license token and reads its claims: signature and structure, without using the time.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use chrono::{DateTime, Datelike as _, Utc};
use ring::signature::{ED25519, UnparsedPublicKey};
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::claims::LicenseClaims;

/// A longer token is refused before it is parsed. Real tokens have a few kilobytes.
pub const MAX_TOKEN_BYTES: usize = 64 * 1024;

/// The only version of claims that coderd accepts.
const CLAIMS_VERSION: u64 = 3;

/// Why a license token was refused. Messages contain no part of the token's body or signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LicenseError {
    /// Longer than [`MAX_TOKEN_BYTES`].
    #[error("the token has {bytes} bytes; the maximum is {MAX_TOKEN_BYTES}")]
    TooLarge {
        /// Length of the token.
        bytes: usize,
    },
    /// Not three parts of unpadded base64url, or not JSON objects.
    #[error("not a license token: {0}")]
    Malformed(&'static str),
    /// Another signature algorithm than `EdDSA`, or none.
    #[error("signature algorithm {0:?} is not accepted; expected \"EdDSA\"")]
    Algorithm(String),
    /// The header has no `kid`.
    #[error("header field kid is missing")]
    MissingKeyId,
    /// No configured public key has this name.
    #[error("header field kid names the key {0:?}, which is not configured")]
    UnknownKey(String),
    /// The named key did not make the signature.
    #[error("the signature does not match the key {0:?}")]
    BadSignature(String),
    /// A `version` other than 3.
    #[error("claim version is {0}; expected {CLAIMS_VERSION}")]
    Version(u64),
    /// A required claim is missing, null or empty.
    #[error("claim {0} is missing")]
    MissingClaim(&'static str),
    /// A claim has another type, or a value out of range.
    #[error("claim {field} must be {expected}")]
    InvalidClaim {
        /// Name of the claim.
        field: &'static str,
        /// The expected value.
        expected: &'static str,
    },
    /// The license is for other deployments.
    #[error("claim deployment_ids names {}, but this deployment is {deployment}", .named.join(", "))]
    OtherDeployment {
        /// The deployments that the license names.
        named: Vec<String>,
        deployment: Uuid,
    },
}

/// Why a configured public key is not usable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("public key {key_id:?}: {reason}")]
pub struct KeyError {
    /// Name of the key (`kid`).
    pub key_id: String,
    /// The fault.
    pub reason: &'static str,
}

/// A license with a valid signature and structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedLicense {
    pub claims: LicenseClaims,
    /// Name of the key that signed it.
    pub key_id: String,
    /// SHA-256 of the token's text. It identifies the license where the token itself must not be
    /// stored.
    pub jwt_sha256: [u8; 32],
}

/// The public keys that may sign licenses, by name (`kid`).
#[derive(Clone, Default)]
pub struct PublicKeys(BTreeMap<String, UnparsedPublicKey<Vec<u8>>>);

impl fmt::Debug for PublicKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl PublicKeys {
    /// A set without keys refuses every license.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an Ed25519 public key: PEM (`BEGIN PUBLIC KEY`), or its 32 bytes in base64 or in hex.
    ///
    /// # Errors
    /// If the text is neither, or if the name is empty or already used.
    pub fn add(&mut self, key_id: &str, key: &str) -> Result<(), KeyError> {
        let refuse = |reason| KeyError { key_id: key_id.to_owned(), reason };
        if key_id.is_empty() {
            return Err(refuse("the name is empty"));
        }
        if self.0.contains_key(key_id) {
            return Err(refuse("named twice"));
        }
        let key = key.trim();
        let bytes = if key.starts_with("-----BEGIN") {
            pem_key(key).ok_or_else(|| refuse("not an Ed25519 public key in PEM"))?
        } else {
            raw_key(key).ok_or_else(|| refuse("neither PEM nor 32 bytes in base64 or hex"))?
        };
        self.0.insert(key_id.to_owned(), UnparsedPublicKey::new(&ED25519, bytes));
        Ok(())
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Verifies the token like [`PublicKeys::verify`], and that it is for this deployment.
    ///
    /// # Errors
    /// [`LicenseError::OtherDeployment`], and those of [`PublicKeys::verify`].
    pub fn verify_for(&self, jwt: &str, deployment: Uuid) -> Result<VerifiedLicense, LicenseError> {
        let license = self.verify(jwt)?;
        match license.claims.is_for(deployment) {
            true => Ok(license),
            false => Err(LicenseError::OtherDeployment {
                named: license.claims.deployment_ids,
                deployment,
            }),
        }
    }

    /// Verifies the token's signature and the structure of its claims. [`LicenseClaims::validity`]
    /// checks the time. As in coderd, issuer, audience, subject and `deployment_ids` are not
    /// checked.
    pub fn verify(&self, jwt: &str) -> Result<VerifiedLicense, LicenseError> {
        if jwt.len() > MAX_TOKEN_BYTES {
            return Err(LicenseError::TooLarge { bytes: jwt.len() });
        }
        let token = Token::split(jwt)?;
        let key_id = token.key_id()?;
        let key = self.0.get(&key_id).ok_or_else(|| LicenseError::UnknownKey(key_id.clone()))?;
        let signature = URL_SAFE_NO_PAD
            .decode(token.signature)
            .map_err(|_| LicenseError::Malformed("the signature is not base64url"))?;
        key.verify(token.signed.as_bytes(), &signature)
            .map_err(|_| LicenseError::BadSignature(key_id.clone()))?;
        let malformed = LicenseError::Malformed("the claims are not a JSON object in base64url");
        let claims = json_object(token.claims).ok_or(malformed)?;
        let jwt_sha256 = Sha256::digest(jwt.as_bytes()).into();
        Ok(VerifiedLicense { claims: license_claims(&Claims(claims))?, key_id, jwt_sha256 })
    }
}

fn raw_key(text: &str) -> Option<Vec<u8>> {
    let bytes =
        if text.len() == 64 { hex::decode(text).ok()? } else { STANDARD.decode(text).ok()? };
    (bytes.len() == 32).then_some(bytes)
}

/// The DER of a SubjectPublicKeyInfo before the 32 bytes of an Ed25519 key (RFC 8410).
const ED25519_KEY_HEAD: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

fn pem_key(text: &str) -> Option<Vec<u8>> {
    let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes()).ok()?;
    let bytes = der.strip_prefix(&ED25519_KEY_HEAD)?;
    (bytes.len() == 32).then(|| bytes.to_vec())
}

/// The parts of a JWT (RFC 7519), none of them decoded.
struct Token<'a> {
    header: &'a str,
    claims: &'a str,
    signature: &'a str,
    /// The header and the claims, with the dot between them.
    signed: &'a str,
}

impl<'a> Token<'a> {
    fn split(jwt: &'a str) -> Result<Self, LicenseError> {
        let parts = jwt.rsplit_once('.').and_then(|(signed, signature)| {
            let (header, claims) = signed.split_once('.')?;
            Some(Token { header, claims, signature, signed })
        });
        let token = parts.filter(|token| !token.claims.contains('.'));
        token.ok_or(LicenseError::Malformed("not three parts"))
    }

    /// The `kid` of a header whose `alg` is accepted.
    fn key_id(&self) -> Result<String, LicenseError> {
        let header = json_object(self.header);
        let header = header
            .ok_or(LicenseError::Malformed("the header is not a JSON object in base64url"))?;
        match header.get("alg").and_then(Value::as_str) {
            Some("EdDSA") => {}
            other => return Err(LicenseError::Algorithm(other.unwrap_or_default().to_owned())),
        }
        match header.get("kid").and_then(Value::as_str) {
            Some(key_id) if !key_id.is_empty() => Ok(key_id.to_owned()),
            _ => Err(LicenseError::MissingKeyId),
        }
    }
}

fn json_object(base64url: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(base64url).ok()?).ok()
}

fn license_claims(claims: &Claims) -> Result<LicenseClaims, LicenseError> {
    match claims.version()? {
        CLAIMS_VERSION => {}
        other => return Err(LicenseError::Version(other)),
    }
    Ok(LicenseClaims {
        issued_at: claims.required_instant("iat")?,
        not_before: claims.required_instant("nbf")?,
        license_expires: claims.required_instant("license_expires")?,
        expires_at: claims.required_instant("exp")?,
        token_id: Some(claims.text("jti")?).filter(|id| !id.is_empty()),
        account_type: claims.required_text("account_type")?,
        account_id: claims.required_text("account_id")?,
        deployment_ids: claims.texts("deployment_ids")?,
        trial: claims.flag("trial")?,
        feature_set: claims.text("feature_set")?,
        all_features: claims.flag("all_features")?,
        features: claims.features()?,
        addons: claims.texts("addons")?,
        require_telemetry: claims.flag("require_telemetry")?,
        publish_usage_data: claims.flag("publish_usage_data")?,
    })
}

/// The claims by name. Null is treated as absent, because Go writes empty lists and maps as null.
/// Unused claims are ignored.
struct Claims(Map<String, Value>);

impl Claims {
    fn get(&self, field: &'static str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn version(&self) -> Result<u64, LicenseError> {
        let Some(value) = self.get("version") else {
            return Err(LicenseError::MissingClaim("version"));
        };
        value
            .as_u64()
            .ok_or(LicenseError::InvalidClaim { field: "version", expected: "a whole number" })
    }

    /// A numeric date: seconds since 1970, with a fraction to the microsecond (Go's JWT library
    /// ignores fractions and writes none). Only years 1 to 9999, which RFC 3339 and PostgreSQL can
    /// both represent.
    fn required_instant(&self, field: &'static str) -> Result<DateTime<Utc>, LicenseError> {
        let value = self.get(field).ok_or(LicenseError::MissingClaim(field))?;
        let invalid = LicenseError::InvalidClaim {
            field,
            expected: "a numeric date between the years 1 and 9999",
        };
        instant(value).filter(|at| (1..=9999).contains(&at.year())).ok_or(invalid)
    }

    fn text(&self, field: &'static str) -> Result<String, LicenseError> {
        let Some(value) = self.get(field) else { return Ok(String::new()) };
        plain_text(value)
            .ok_or(LicenseError::InvalidClaim { field, expected: "a string without NUL" })
    }

    fn required_text(&self, field: &'static str) -> Result<String, LicenseError> {
        match self.text(field)? {
            text if text.is_empty() => Err(LicenseError::MissingClaim(field)),
            text => Ok(text),
        }
    }

    fn texts(&self, field: &'static str) -> Result<Vec<String>, LicenseError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let texts = value.as_array().and_then(|items| items.iter().map(plain_text).collect());
        texts.ok_or(LicenseError::InvalidClaim { field, expected: "a list of strings without NUL" })
    }

    fn flag(&self, field: &'static str) -> Result<bool, LicenseError> {
        let Some(value) = self.get(field) else { return Ok(false) };
        value.as_bool().ok_or(LicenseError::InvalidClaim { field, expected: "true or false" })
    }

    fn features(&self) -> Result<BTreeMap<String, i64>, LicenseError> {
        let Some(value) = self.get("features") else { return Ok(BTreeMap::new()) };
        let feature = |(name, value): (&String, &Value)| {
            (!name.contains('\0')).then_some((name.clone(), value.as_i64()?))
        };
        let features =
            value.as_object().and_then(|features| features.iter().map(feature).collect());
        features.ok_or(LicenseError::InvalidClaim {
            field: "features",
            expected: "an object of whole numbers, names without NUL",
        })
    }
}

/// Text without NUL, which PostgreSQL cannot store.
fn plain_text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.contains('\0')).map(str::to_owned)
}

fn instant(value: &Value) -> Option<DateTime<Utc>> {
    if let Some(seconds) = value.as_i64() {
        return DateTime::from_timestamp(seconds, 0);
    }
    let micros = (value.as_f64()? * 1e6).round();
    // the value is in the range of the cast and already whole
    #[allow(clippy::cast_possible_truncation)]
    (micros.abs() < 9e18).then(|| DateTime::from_timestamp_micros(micros as i64)).flatten()
}
