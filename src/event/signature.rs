//! Signatures of records. With keys, the right to write to a topic does not suffice to add events.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hmac;
use sha2::{Digest as _, Sha256};

use super::cause::RejectCause;
use super::message::Message;
use crate::words::words;

/// The header of a signature: `v1:SIGNER:KEY:TAG`, the tag in base64.
pub const SIGNATURE: &str = "tallyline-signature";

/// Minimum length of a key: the length of the tag.
pub const MIN_KEY_BYTES: usize = 32;

/// Maximum length of a header that is parsed: version, signer, a key name of at most 100 bytes, and
/// the tag.
const MAX_HEADER_BYTES: usize = 256;

words! {
    /// The kind of process that signs a record.
    Signer {
        /// A collector that read the event in coderd's database.
        Collector = "collector",
        /// An operator or this program, which appends a reject to the log again.
        Operator = "operator",
    }
}

/// Reasons why a record's signature is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The signature header is missing.
    #[error("the header {SIGNATURE} is missing, and records from this offset on must be signed")]
    Unsigned,
    /// The header is malformed, names an unknown key, or does not match the record.
    #[error("the header {SIGNATURE} {0}")]
    Bad(String),
}

impl SignatureError {
    #[must_use]
    pub fn cause(&self) -> RejectCause {
        match self {
            SignatureError::Unsigned => RejectCause::Unsigned,
            SignatureError::Bad(_) => RejectCause::BadSignature,
        }
    }
}

/// The keys of a pipeline. Without keys, records are neither signed nor verified.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Signatures {
    keys: BTreeMap<String, Vec<u8>>,
    signing: Option<String>,
}

impl std::fmt::Debug for Signatures {
    /// Omits the keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signatures")
            .field("keys", &self.keys.keys())
            .field("signing", &self.signing)
            .finish()
    }
}

impl Signatures {
    /// Verification keys by name, and the name of the signing key.
    ///
    /// # Errors
    /// The text has the key's name and not the key. A name has `:`, a key is too short, or the
    /// signing key is not among them.
    pub fn new(keys: BTreeMap<String, Vec<u8>>, signing: Option<String>) -> Result<Self, String> {
        for (name, key) in &keys {
            if name.is_empty() || name.len() > 100 || name.contains(':') {
                return Err(format!("key {name:?}: the name must have 1 to 100 bytes and no ':'"));
            }
            if key.len() < MIN_KEY_BYTES {
                return Err(format!(
                    "key {name:?}: has {} bytes; at least {MIN_KEY_BYTES} are needed",
                    key.len()
                ));
            }
        }
        match &signing {
            Some(name) if !keys.contains_key(name) => {
                Err(format!("signing key {name:?}: is not among the verification keys"))
            }
            _ => Ok(Signatures { keys, signing }),
        }
    }

    /// Whether records are verified.
    #[must_use]
    pub fn verify(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whether appended records are signed.
    #[must_use]
    pub fn sign(&self) -> bool {
        self.signing.is_some()
    }

    /// Whether a record names this process's signing key.
    #[must_use]
    pub fn is_own_key(&self, message: &Message) -> bool {
        let value = message
            .headers
            .iter()
            .find(|(header, _)| header.eq_ignore_ascii_case(SIGNATURE))
            .and_then(|(_, value)| value.as_deref());
        let header = value.and_then(|value| Header::parse(value).ok());
        header.is_some_and(|header| Some(header.key) == self.signing.as_deref())
    }

    /// Signs the message for the topic of that full name, replacing any signature. Without a
    /// signing key the message stays unchanged.
    #[must_use]
    pub fn signed(&self, signer: Signer, topic: &str, mut message: Message) -> Message {
        let Some((name, key)) =
            self.signing.as_ref().and_then(|name| self.keys.get_key_value(name))
        else {
            return message;
        };
        let tag =
            hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &form(signer, topic, &message));
        message.headers.retain(|(header, _)| !header.eq_ignore_ascii_case(SIGNATURE));
        let value = format!("v1:{}:{name}:{}", signer.as_str(), BASE64.encode(tag.as_ref()));
        message.headers.push((SIGNATURE.to_owned(), Some(value.into_bytes())));
        message
    }

    /// The signer of a record of the topic of that full name. The prefix in the name keeps records
    /// of one site invalid at another site.
    pub fn signer(&self, topic: &str, message: &Message) -> Result<Signer, SignatureError> {
        let mut values =
            message.headers.iter().filter(|(header, _)| header.eq_ignore_ascii_case(SIGNATURE));
        let Some((_, value)) = values.next() else { return Err(SignatureError::Unsigned) };
        if values.next().is_some() {
            return Err(SignatureError::Bad("occurs twice".to_owned()));
        }
        let Header { signer, key: name, tag } =
            Header::parse(value.as_deref().unwrap_or_default()).map_err(SignatureError::Bad)?;
        let Some(key) = self.keys.get(name) else {
            return Err(SignatureError::Bad(format!(
                "names the key {name:?}, which is not in log.verification_keys"
            )));
        };
        match hmac::verify(
            &hmac::Key::new(hmac::HMAC_SHA256, key),
            &form(signer, topic, message),
            &tag,
        ) {
            Ok(()) => Ok(signer),
            Err(_) => Err(SignatureError::Bad(format!(
                "does not match the record under the key {name:?}"
            ))),
        }
    }
}

/// A parsed signature header.
struct Header<'a> {
    signer: Signer,
    key: &'a str,
    tag: Vec<u8>,
}

impl<'a> Header<'a> {
    /// Parses the header's value. The error text follows the header's name.
    fn parse(value: &'a [u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(value).ok().filter(|text| text.len() <= MAX_HEADER_BYTES);
        let text =
            text.ok_or_else(|| format!("must be UTF-8 of at most {MAX_HEADER_BYTES} bytes"))?;
        let mut parts = text.split(':');
        let (Some("v1"), Some(signer), Some(key), Some(tag), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("must be v1:SIGNER:KEY:TAG".to_owned());
        };
        let known = signer.parse().ok();
        let signer = known.ok_or("must name the signer collector or operator")?;
        let tag = BASE64.decode(tag).map_err(|_| "must end in a tag in base64")?;
        Ok(Header { signer, key, tag })
    }
}

/// The signed bytes: all parts of a record that are ever read, each with its length before it. The
/// body is represented by its SHA-256, which is known even if an oversized body is cut. The
/// record's key only selects the partition, and other headers are ignored. A test pins the form; a
/// change needs a new version.
fn form(signer: Signer, topic: &str, message: &Message) -> Vec<u8> {
    let mut form = Vec::new();
    let mut part = |bytes: Option<&[u8]>| {
        form.push(u8::from(bytes.is_some()));
        let bytes = bytes.unwrap_or_default();
        form.extend((bytes.len() as u64).to_be_bytes());
        form.extend(bytes);
    };
    part(Some(b"tallyline.signature.v1"));
    part(Some(signer.as_str().as_bytes()));
    part(Some(topic.as_bytes()));
    let body = message.payload.as_deref().map(|body| {
        message.oversized.map_or_else(|| Sha256::digest(body).into(), |whole| whole.sha256)
    });
    part(body.as_ref().map(<[u8; 32]>::as_slice));
    for (name, value) in &message.headers {
        let name = name.to_ascii_lowercase();
        if name == "content-type" || name.starts_with("ce_") {
            part(Some(name.as_bytes()));
            part(value.as_deref());
        }
    }
    form
}

/// SHA-256 of the headers without the signature, in the form of the tables. The schema's function
/// `unsigned_headers` computes the same.
#[must_use]
pub fn unsigned_headers(message: &Message) -> [u8; 32] {
    let mut headers = message.headers.clone();
    headers.retain(|(name, _)| !name.eq_ignore_ascii_case(SIGNATURE));
    Sha256::digest(Message { headers, ..Message::default() }.headers_json()).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::{MAX_PAYLOAD_BYTES, Topic};

    const USAGE: &str = Topic::AgentUsage.name();

    fn keys(names: &[&str], signing: &str) -> Signatures {
        let keys = names.iter().map(|name| {
            ((*name).to_owned(), format!("{name}-{}", "k".repeat(MIN_KEY_BYTES)).into_bytes())
        });
        Signatures::new(keys.collect(), Some(signing.to_owned())).expect("keys")
    }

    fn message() -> Message {
        let header = |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec()));
        let headers = vec![
            header("ce_id", "usage-1"),
            header("ce_type", "dc_managed_agents_v1"),
            header("content-type", "application/json"),
        ];
        Message {
            key: Some(b"one".to_vec()),
            headers,
            payload: Some(br#"{"count":3}"#.to_vec()),
            ..Message::default()
        }
    }

    fn signed(signatures: &Signatures) -> Message {
        signatures.signed(Signer::Collector, USAGE, message())
    }

    #[test]
    fn the_signature_is_pinned() {
        let (_, value) = signed(&keys(&["2026"], "2026")).headers.pop().expect("a header");
        let value = String::from_utf8(value.expect("a value")).expect("text");
        assert_eq!(value, "v1:collector:2026:kgi9jBu9Mv5LcQ05Rf4IYmWj+ubvtyqWFdrzDiejuYY=");
    }

    #[test]
    fn a_signature_names_its_signer_and_a_retired_key_still_verifies() {
        let (old, both) = (keys(&["2026"], "2026"), keys(&["2026", "2027"], "2027"));
        let record = signed(&old);
        assert_eq!(both.signer(USAGE, &record), Ok(Signer::Collector));
        let resigned = both.signed(Signer::Operator, USAGE, record.clone());
        assert_eq!(
            resigned.headers.len(),
            record.headers.len(),
            "a new signature replaces the old one"
        );
        assert_eq!(both.signer(USAGE, &resigned), Ok(Signer::Operator));
        assert!(
            matches!(old.signer(USAGE, &resigned), Err(SignatureError::Bad(why)) if why.contains("2027"))
        );
        assert_eq!(both.signer(USAGE, &message()), Err(SignatureError::Unsigned));
    }

    #[test]
    fn every_part_that_is_parsed_is_signed() {
        let signatures = keys(&["2026"], "2026");
        let record = signed(&signatures);
        let refused = |topic: &str, change: &dyn Fn(&mut Message)| {
            let mut altered = record.clone();
            change(&mut altered);
            matches!(signatures.signer(topic, &altered), Err(SignatureError::Bad(_)))
        };
        assert!(refused(Topic::WorkspaceBuilds.name(), &|_| {}), "another topic");
        assert!(refused(&format!("staging.{USAGE}"), &|_| {}), "the same topic of another site");
        assert!(refused(USAGE, &|record| record.payload = Some(br#"{"count":4}"#.to_vec())));
        assert!(refused(USAGE, &|record| record.payload = None));
        assert!(refused(USAGE, &|record| record.headers[0].1 = Some(b"usage-2".to_vec())));
        assert!(refused(USAGE, &|record| record
            .headers
            .push(("CE_publishedat".into(), Some(b"2026-01-01T00:00:00Z".to_vec())))));
        assert!(refused(USAGE, &|record| drop(record.headers.remove(1))));
        assert!(refused(USAGE, &|record| record.headers.swap(0, 1)));
        assert!(refused(USAGE, &|record| record.headers.push(record.headers[3].clone())), "twice");
        assert!(!refused(USAGE, &|record| record.key = None), "a key only chooses the partition");
        assert!(!refused(USAGE, &|record| record.headers.push(("traceparent".into(), None))));
    }

    #[test]
    fn a_record_whose_body_is_cut_verifies_by_the_hash_of_the_whole() {
        let signatures = keys(&["2026"], "2026");
        let whole = vec![b'x'; MAX_PAYLOAD_BYTES + 1];
        let signed = signatures.signed(
            Signer::Collector,
            USAGE,
            Message { payload: Some(whole.clone()), ..message() },
        );
        let record_with =
            |body: &[u8]| Message::from_log(signed.key.clone(), signed.headers.clone(), Some(body));
        assert_eq!(signatures.signer(USAGE, &record_with(&whole)), Ok(Signer::Collector));
        let altered = record_with(&[&whole[1..], b"y"].concat());
        assert!(
            matches!(signatures.signer(USAGE, &altered), Err(SignatureError::Bad(_))),
            "the part that is not kept"
        );
    }

    #[test]
    fn an_error_names_an_unusable_key_without_its_value() {
        let new = |name: &str, key: &str, signing: Option<&str>| {
            Signatures::new(
                [(name.to_owned(), key.as_bytes().to_vec())].into(),
                signing.map(str::to_owned),
            )
            .expect_err("refused")
        };
        assert_eq!(
            new("2026", "hunter2", None),
            "key \"2026\": has 7 bytes; at least 32 are needed"
        );
        assert!(new("a:b", &"k".repeat(32), None).contains("no ':'"));
        assert!(new("2026", &"k".repeat(32), Some("2027")).contains("\"2027\": is not among"));
        assert!(!format!("{:?}", keys(&["2026"], "2026")).contains("kkk"));
    }

    proptest! {
        /// A forged header never verifies and never causes a panic.
        #[test]
        fn any_header_gives_a_signer_or_an_error(value in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300),
            "v1:(collector|operator):2026:[A-Za-z0-9+/=]{0,60}".prop_map(String::into_bytes),
            "[v:0-9a-z=]{0,80}".prop_map(String::into_bytes),
        ]) {
            let mut forged = message();
            forged.headers.push((SIGNATURE.to_owned(), Some(value)));
            let answer = keys(&["2026"], "2026").signer(USAGE, &forged);
            prop_assert!(matches!(answer, Err(SignatureError::Bad(_))), "{answer:?}");
        }
    }
}
