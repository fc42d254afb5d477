//! Verifies a license token and reads its claims: signature and structure, without using the time.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use chrono::{DateTime, Datelike as _, Utc};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
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
    #[error("the token has {bytes} bytes, more than {MAX_TOKEN_BYTES}")]
    TooLarge {
        /// Length of the token.
        bytes: usize,
    },
    /// Not three parts of unpadded base64url, or not JSON objects.
    #[error("not a license token: {0}")]
    Malformed(&'static str),
    /// Another signature algorithm than `EdDSA`, or none.
    #[error("signature algorithm {0:?}, only \"EdDSA\" is accepted")]
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
    #[error("claim version is {0}, only {CLAIMS_VERSION} is accepted")]
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
    #[error("claim deployment_ids names {}, not this deployment, {deployment}", .named.join(", "))]
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
    /// SHA-256 of the token's text. It identifies the license where the token itself must not be stored.
    pub jwt_sha256: [u8; 32],
}

/// The public keys that may sign licenses, by name (`kid`).
#[derive(Clone, Default)]
pub struct PublicKeys(BTreeMap<String, DecodingKey>);

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
        let decoded = if key.starts_with("-----BEGIN") {
            DecodingKey::from_ed_pem(key.as_bytes()).map_err(|_| refuse("not an Ed25519 public key in PEM"))?
        } else {
            let bytes = raw_key(key).ok_or_else(|| refuse("neither PEM nor 32 bytes in base64 or hex"))?;
            DecodingKey::from_ed_der(&bytes)
        };
        self.0.insert(key_id.to_owned(), decoded);
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
            false => Err(LicenseError::OtherDeployment { named: license.claims.deployment_ids, deployment }),
        }
    }

    /// Verifies the token's signature and the structure of its claims. [`LicenseClaims::validity`] checks the time. As in coderd, issuer,
    /// audience, subject and `deployment_ids` are not checked.
    pub fn verify(&self, jwt: &str) -> Result<VerifiedLicense, LicenseError> {
        if jwt.len() > MAX_TOKEN_BYTES {
            return Err(LicenseError::TooLarge { bytes: jwt.len() });
        }
        let key_id = key_id(jwt)?;
        let key = self.0.get(&key_id).ok_or_else(|| LicenseError::UnknownKey(key_id.clone()))?;
        let claims = jsonwebtoken::decode::<Map<String, Value>>(jwt, key, &signature_only())
            .map_err(|error| match error.kind() {
                jsonwebtoken::errors::ErrorKind::InvalidSignature => LicenseError::BadSignature(key_id.clone()),
                _ => LicenseError::Malformed("the claims are not a JSON object in base64url"),
            })?
            .claims;
        let jwt_sha256 = Sha256::digest(jwt.as_bytes()).into();
        Ok(VerifiedLicense { claims: license_claims(&Claims(claims))?, key_id, jwt_sha256 })
    }
}

fn raw_key(text: &str) -> Option<Vec<u8>> {
    let bytes = if text.len() == 64 { hex::decode(text).ok()? } else { STANDARD.decode(text).ok()? };
    (bytes.len() == 32).then_some(bytes)
}

/// The library only checks the signature, because for time claims it would read the machine's clock.
fn signature_only() -> Validation {
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation
}

/// The `kid` of a header whose `alg` is accepted. The library does not parse the header, because its error would not name an unknown
/// algorithm.
fn key_id(jwt: &str) -> Result<String, LicenseError> {
    let mut parts = jwt.split('.');
    let (Some(header), Some(_), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(LicenseError::Malformed("not three parts"));
    };
    let header = URL_SAFE_NO_PAD.decode(header).map_err(|_| LicenseError::Malformed("the header is not base64url"))?;
    let header: Map<String, Value> =
        serde_json::from_slice(&header).map_err(|_| LicenseError::Malformed("the header is not a JSON object"))?;
    match header.get("alg").and_then(Value::as_str) {
        Some("EdDSA") => {}
        other => return Err(LicenseError::Algorithm(other.unwrap_or_default().to_owned())),
    }
    match header.get("kid").and_then(Value::as_str) {
        Some(key_id) if !key_id.is_empty() => Ok(key_id.to_owned()),
        _ => Err(LicenseError::MissingKeyId),
    }
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

/// The claims by name. Null is treated as absent, because Go writes empty lists and maps as null. Unused claims are ignored.
struct Claims(Map<String, Value>);

impl Claims {
    fn get(&self, field: &'static str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn version(&self) -> Result<u64, LicenseError> {
        let Some(value) = self.get("version") else { return Err(LicenseError::MissingClaim("version")) };
        value.as_u64().ok_or(LicenseError::InvalidClaim { field: "version", expected: "a whole number" })
    }

    /// A numeric date: seconds since 1970, with a fraction to the microsecond (Go's JWT library ignores fractions and writes none). Only
    /// years 1 to 9999, which RFC 3339 and PostgreSQL can both represent.
    fn required_instant(&self, field: &'static str) -> Result<DateTime<Utc>, LicenseError> {
        let value = self.get(field).ok_or(LicenseError::MissingClaim(field))?;
        let invalid = LicenseError::InvalidClaim { field, expected: "a numeric date between the years 1 and 9999" };
        instant(value).filter(|at| (1..=9999).contains(&at.year())).ok_or(invalid)
    }

    fn text(&self, field: &'static str) -> Result<String, LicenseError> {
        let Some(value) = self.get(field) else { return Ok(String::new()) };
        plain_text(value).ok_or(LicenseError::InvalidClaim { field, expected: "a string without NUL" })
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
        let feature = |(name, value): (&String, &Value)| (!name.contains('\0')).then_some((name.clone(), value.as_i64()?));
        let features = value.as_object().and_then(|features| features.iter().map(feature).collect());
        features.ok_or(LicenseError::InvalidClaim { field: "features", expected: "an object of whole numbers, names without NUL" })
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
