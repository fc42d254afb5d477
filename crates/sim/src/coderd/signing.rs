//! Signs licenses: Ed25519 keys from 32 bytes, JWTs with a `kid`.

use anyhow::Context;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The start of an Ed25519 key's SubjectPublicKeyInfo form (RFC 8410), before the 32 public bytes.
const SPKI_HEAD: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

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
    key: Ed25519KeyPair,
    public: LicenseKey,
}

impl Signer {
    /// The key pair with these 32 secret bytes.
    pub fn new(secret: [u8; 32], kid: &str) -> anyhow::Result<Self> {
        let key = Ed25519KeyPair::from_seed_unchecked(&secret).ok().context("the license key")?;
        let body = STANDARD.encode([SPKI_HEAD.as_slice(), key.public_key().as_ref()].concat());
        let public_key_pem =
            format!("-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n");
        Ok(Signer { key, public: LicenseKey { kid: kid.to_owned(), public_key_pem } })
    }

    #[must_use]
    pub fn public(&self) -> &LicenseKey {
        &self.public
    }

    /// The claims as a signed JWT.
    pub fn sign(&self, claims: &impl Serialize) -> anyhow::Result<String> {
        let header = json!({ "typ": "JWT", "alg": "EdDSA", "kid": self.public.kid }).to_string();
        let claims = serde_json::to_vec(claims).context("the claims as JSON")?;
        Ok(self.sign_parts(header.as_bytes(), &claims))
    }

    /// A JWT of any header and any claims, also of invalid ones.
    #[must_use]
    pub fn sign_parts(&self, header: &[u8], claims: &[u8]) -> String {
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }
}

#[cfg(test)]
mod tests {
    use tallyline::license::{LicenseError, PublicKeys};

    use super::*;

    #[test]
    fn a_license_verifies_with_the_public_key_that_is_handed_out_and_with_no_other() {
        let claims = json!({
            "iat": 1, "nbf": 1, "exp": 2, "license_expires": 2, "version": 3,
            "account_type": "salesforce", "account_id": "account-1",
        });
        let signer = Signer::new([7; 32], "k1").unwrap();
        let jwt = signer.sign(&claims).unwrap();
        let verified = |signer: &Signer| {
            let mut keys = PublicKeys::new();
            keys.add("k1", &signer.public().public_key_pem).unwrap();
            keys.verify(&jwt)
        };
        assert_eq!(verified(&signer).unwrap().key_id, "k1");
        let other = Signer::new([8; 32], "k1").unwrap();
        assert_eq!(verified(&other), Err(LicenseError::BadSignature("k1".to_owned())));
        let payload = URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1).unwrap()).unwrap();
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&payload).unwrap(), claims);
    }
}
