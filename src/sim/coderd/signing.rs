//! Signs licenses: Ed25519 keys from 32 bytes, JWTs with a `kid`.

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::{Deserialize, Serialize};

use super::licenses::Claims;

/// The start of an Ed25519 key's PKCS #8 form (RFC 8410), before the 32 secret bytes.
const PKCS8_HEAD: [u8; 16] = [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
/// The start of an Ed25519 key's SubjectPublicKeyInfo form (RFC 8410), before the 32 public bytes.
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The public half of the key that signed the licenses, for the configuration of a reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LicenseKey {
    /// The JWT header's `kid`.
    pub kid: String,
    /// The public key, PEM (`BEGIN PUBLIC KEY`).
    pub public_key_pem: String,
}

/// A key pair that signs licenses.
pub struct Signer {
    key: EncodingKey,
    public: LicenseKey,
}

impl Signer {
    /// The key pair with these 32 secret bytes.
    pub fn new(secret: [u8; 32], kid: &str) -> anyhow::Result<Self> {
        let key = EncodingKey::from_ed_der(&[PKCS8_HEAD.as_slice(), &secret].concat());
        let jwk = Jwk::from_encoding_key(&key, Algorithm::EdDSA).context("public half of the license key")?;
        let AlgorithmParameters::OctetKeyPair(pair) = jwk.algorithm else { anyhow::bail!("an Ed25519 key is an octet key pair") };
        let public = URL_SAFE_NO_PAD.decode(pair.x).context("public key's base64")?;
        let body = STANDARD.encode([SPKI_HEAD.as_slice(), &public].concat());
        let public_key_pem = format!("-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n");
        Ok(Signer { key, public: LicenseKey { kid: kid.to_owned(), public_key_pem } })
    }

    #[must_use]
    pub fn public(&self) -> &LicenseKey {
        &self.public
    }

    /// The claims as a signed JWT.
    pub fn sign(&self, claims: &Claims) -> anyhow::Result<String> {
        let header = Header { kid: Some(self.public.kid.clone()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, claims, &self.key).context("sign a license")
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation};

    use super::*;
    use crate::sim::coderd::licenses::tests::claims;

    #[test]
    fn a_license_verifies_with_the_public_key_that_is_handed_out_and_with_no_other() {
        let signer = Signer::new([7; 32], "k1").unwrap();
        let jwt = signer.sign(&claims()).unwrap();
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.validate_exp = false;
        let verified = |signer: &Signer| {
            let key = DecodingKey::from_ed_pem(signer.public().public_key_pem.as_bytes()).unwrap();
            jsonwebtoken::decode::<Claims>(&jwt, &key, &validation)
        };
        assert_eq!(verified(&signer).unwrap().claims, claims());
        assert_eq!(jsonwebtoken::decode_header(&jwt).unwrap().kid.as_deref(), Some("k1"));
        assert!(verified(&Signer::new([8; 32], "k1").unwrap()).is_err());
    }
}
