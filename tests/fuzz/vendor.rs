//! Foreign input over HTTP: Tallyman's answers, and the header `Accept` of a scraper.

use tallyline::metrics::Format;
use tallyline::tallyman::{Answer, Verdict};

/// The body of a 200.
pub fn answer(input: &[u8]) -> bool {
    let sent = ["event-a", "event-b", "", "nul\0"];
    let Ok(answer) = Answer::parse(input) else { return false };
    let verdicts = answer.verdicts(sent);
    assert_eq!(
        verdicts.of_sent.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(),
        sent,
        "each that was sent, once, in order"
    );
    for (_, verdict) in &verdicts.of_sent {
        if let Verdict::RefusedPermanently(message) | Verdict::RefusedForNow(message) = verdict {
            assert!(!message.contains('\0') && message.chars().count() <= 1000);
        }
    }
    // money: only events in the answer are accepted
    if !input.windows(15).any(|part| part == b"accepted_events") && !input.contains(&b'\\') {
        assert!(verdicts.of_sent.iter().all(|(_, verdict)| *verdict != Verdict::Accepted));
    }
    true
}

/// The header's text; accepted: protobuf.
pub fn accept(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let format = Format::for_accept(&text);
    // an offer of an unsupported format changes nothing
    assert_eq!(Format::for_accept(&format!("{text},image/png")), format);
    if format == Format::Protobuf {
        let lower = text.to_ascii_lowercase();
        assert!(
            ["application/vnd.google.protobuf", "delimited"]
                .iter()
                .all(|word| lower.contains(word)),
            "{text}"
        );
    }
    format == Format::Protobuf
}
