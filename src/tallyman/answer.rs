//! The answer of Tallyman: accepted, refused and unnamed events.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Deserializer};

use super::SendError;

/// The recorded message of an event that the answer does not name, in coderd's own words.
pub const LEFT_OUT_MESSAGE: &str = "tallyman did not include the event in the response";

/// Longer messages are cut: people read them in a table.
const MAX_MESSAGE_CHARS: usize = 1000;

/// The vendor's verdict for one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// Refused permanently, with the vendor's message.
    RefusedPermanently(String),
    /// Refused for now, with the vendor's message.
    RefusedForNow(String),
    /// Not named in the answer: it may not be accepted, so it is sent again ([`LEFT_OUT_MESSAGE`]).
    LeftOut,
}

/// The verdicts of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdicts {
    /// One for each id that was sent, in the order of sending.
    pub of_sent: Vec<(String, Verdict)>,
    /// The number of ids in the answer that were not sent. They are ignored.
    pub not_sent: usize,
}

/// Tallyman's answer to one request.
///
/// Required keys must be present and of the right type. Unlike elsewhere, an unknown key is not an
/// error: to drop the answer would send accepted events again. Lists may be absent or null, as Go
/// writes empty ones. An absent `permanent` is false, which only retries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    accepted: HashSet<String>,
    refused: HashMap<String, Verdict>,
}

#[derive(Deserialize)]
struct WireAnswer {
    #[serde(default, deserialize_with = "null_as_empty")]
    accepted_events: Vec<Accepted>,
    #[serde(default, deserialize_with = "null_as_empty")]
    rejected_events: Vec<Rejected>,
}

#[derive(Deserialize)]
struct Accepted {
    id: String,
}

#[derive(Deserialize)]
struct Rejected {
    id: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    permanent: bool,
}

fn null_as_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Answer {
    /// Reads the body of a 200.
    ///
    /// # Errors
    /// [`SendError::Undecodable`]. The vendor may then have accepted the events.
    pub fn parse(body: &[u8]) -> Result<Self, SendError> {
        let wire: WireAnswer = serde_json::from_slice(body)
            .map_err(|error| SendError::Undecodable(cut(&error.to_string())))?;
        let refused = |event: Rejected| {
            let message = cut(&event.message);
            let verdict = if event.permanent {
                Verdict::RefusedPermanently(message)
            } else {
                Verdict::RefusedForNow(message)
            };
            (event.id, verdict)
        };
        Ok(Answer {
            accepted: wire.accepted_events.into_iter().map(|event| event.id).collect(),
            refused: wire.rejected_events.into_iter().map(refused).collect(),
        })
    }

    /// The verdict for each of the `sent` ids. An id that is both accepted and refused is accepted.
    #[must_use]
    pub fn verdicts<'a>(&self, sent: impl IntoIterator<Item = &'a str>) -> Verdicts {
        let of_sent: Vec<_> =
            sent.into_iter().map(|id| (id.to_owned(), self.verdict(id))).collect();
        let sent: HashSet<&str> = of_sent.iter().map(|(id, _)| id.as_str()).collect();
        let named: HashSet<&str> =
            self.accepted.iter().chain(self.refused.keys()).map(String::as_str).collect();
        Verdicts { not_sent: named.difference(&sent).count(), of_sent }
    }

    fn verdict(&self, id: &str) -> Verdict {
        if self.accepted.contains(id) {
            Verdict::Accepted
        } else {
            self.refused.get(id).cloned().unwrap_or(Verdict::LeftOut)
        }
    }
}

/// A foreign message that can be stored: without NUL, which PostgreSQL refuses, and of bounded
/// length.
pub(super) fn cut(message: &str) -> String {
    message
        .chars()
        .take(MAX_MESSAGE_CHARS)
        .map(|c| if c == '\0' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdicts(body: &str, sent: &[&str]) -> Verdicts {
        Answer::parse(body.as_bytes()).expect("an answer").verdicts(sent.iter().copied())
    }

    #[test]
    fn each_sent_event_gets_its_verdict() {
        let body = r#"{
            "accepted_events": [{"id": "a"}, {"id": "both"}, {"id": "stranger"}],
            "rejected_events": [
                {"id": "b", "message": "later", "permanent": false},
                {"id": "c", "message": "never", "permanent": true},
                {"id": "both", "message": "no", "permanent": true},
                {"id": "stranger", "message": "no", "permanent": true}
            ]
        }"#;
        let got = verdicts(body, &["c", "both", "a", "d", "b"]);
        let expected = [
            ("c", Verdict::RefusedPermanently("never".to_owned())),
            ("both", Verdict::Accepted),
            ("a", Verdict::Accepted),
            ("d", Verdict::LeftOut),
            ("b", Verdict::RefusedForNow("later".to_owned())),
        ];
        assert_eq!(got.of_sent, expected.map(|(id, verdict)| (id.to_owned(), verdict)));
        assert_eq!(got.not_sent, 1);
    }

    #[test]
    fn empty_lists_leave_every_event_out() {
        for body in [
            r#"{"accepted_events":[],"rejected_events":[]}"#,
            r#"{"accepted_events":null}"#,
            "{}",
            r#"{"new_key":1}"#,
        ] {
            assert_eq!(
                verdicts(body, &["a"]).of_sent,
                [("a".to_owned(), Verdict::LeftOut)],
                "{body}"
            );
        }
    }

    #[test]
    fn another_type_or_trailing_data_is_refused() {
        for body in [
            "",
            "[]x",
            "null",
            r#"{"accepted_events":[{}]}"#,
            r#"{"accepted_events":["a"]}"#,
            r#"{"accepted_events":[{"id":1}]}"#,
            r#"{"rejected_events":[{"id":"a","permanent":"yes"}]}"#,
            r#"{"accepted_events":[]} {}"#,
        ] {
            let error = Answer::parse(body.as_bytes()).expect_err(body);
            assert!(error.to_string().starts_with("decode response body: "), "{error}");
        }
    }

    #[test]
    fn a_message_is_kept_without_nul_and_bounded() {
        let long = format!(
            r#"{{"rejected_events":[{{"id":"a","message":"x\u0000{}","permanent":true}}]}}"#,
            "y".repeat(5000)
        );
        let Verdict::RefusedPermanently(message) = &verdicts(&long, &["a"]).of_sent[0].1 else {
            panic!("refused")
        };
        assert!(message.starts_with("x\u{fffd}y"));
        assert_eq!(message.chars().count(), MAX_MESSAGE_CHARS);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Answer::parse(&body);
        }

        #[test]
        fn a_damaged_answer_never_loses_a_sent_event(position in 0_usize..120, byte: u8) {
            let mut body = br#"{"accepted_events":[{"id":"a"}],"rejected_events":[{"id":"b","message":"no","permanent":true}]}"#.to_vec();
            if let Some(at) = body.get_mut(position) {
                *at = byte;
            }
            if let Ok(answer) = Answer::parse(&body) {
                let ids: Vec<_> = answer.verdicts(["a", "b"]).of_sent.into_iter().map(|(id, _)| id).collect();
                prop_assert_eq!(ids, ["a", "b"]);
            }
        }
    }
}
