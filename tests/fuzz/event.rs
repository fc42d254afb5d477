//! Records and usage payloads.

use tallyline::event::{
    Event, MAX_ID_BYTES, MAX_PAYLOAD_BYTES, Message, ParseError, UsageQuantity, parse,
};

/// A record in HTTP form.
pub fn binary(input: &[u8]) -> bool {
    record(&message(input))
}

/// The record: headers, an empty line, and the body. A header is `name: value`; without a colon it
/// has no value. Without an empty line the body is absent.
pub fn message(input: &[u8]) -> Message {
    let at = input.windows(2).position(|two| two == b"\n\n");
    let (head, payload) =
        at.map_or((input, None), |at| (&input[..at], Some(input[at + 2..].to_vec())));
    let header = |line: &[u8]| {
        let (name, value) = match line.windows(2).position(|two| two == b": ") {
            Some(at) => (&line[..at], Some(line[at + 2..].to_vec())),
            None => (line, None),
        };
        (String::from_utf8_lossy(name).into_owned(), value)
    };
    let headers =
        head.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(header).collect();
    Message { headers, payload, ..Message::default() }
}

/// The body of a record in structured mode.
pub fn structured(input: &[u8]) -> bool {
    let headers = vec![("content-type".to_owned(), Some(b"application/cloudevents+json".to_vec()))];
    record(&Message { headers, payload: Some(input.to_vec()), ..Message::default() })
}

fn record(message: &Message) -> bool {
    match parse(message) {
        Ok(event) => {
            accepted(&event);
            true
        }
        Err(error) => {
            refused(message, &error);
            false
        }
    }
}

/// Checks that both forms of an accepted event give the same event, and that PostgreSQL can store
/// it.
fn accepted(event: &Event) {
    let again = event.to_message();
    assert_eq!(parse(&again).as_ref(), Ok(event));
    let headers = vec![("content-type".to_owned(), Some(b"application/cloudevents+json".to_vec()))];
    let payload = Some(event.to_structured().to_string().into_bytes());
    let structured = Message { headers, payload, ..Message::default() };
    assert_eq!(parse(&structured).as_ref(), Ok(event));
    assert!(!event.id().is_empty() && event.id().len() <= MAX_ID_BYTES);
    assert!(!format!("{event:?}").contains("\\0"), "no NUL in any text");
    assert!((0..=253_402_300_799).contains(&event.time().timestamp()));
    assert!(again.payload.is_some_and(|payload| payload.len() <= MAX_PAYLOAD_BYTES));
}

/// Checks that a refusal is short and names its reason.
fn refused(message: &Message, error: &ParseError) {
    let text = error.to_string();
    assert!(text.len() < 64 * 1024, "{} bytes", text.len());
    assert!(!text.contains('\0'), "PostgreSQL does not accept {text:?}");
    match error {
        ParseError::Tombstone => assert_eq!(message.payload, None),
        ParseError::Oversized(bytes) => {
            assert_eq!(message.payload.as_ref().map(Vec::len), Some(*bytes))
        }
        ParseError::UnreadableBatch(offsets) => {
            assert_eq!(Some(offsets.as_str()), message.unreadable_batch())
        }
        ParseError::Field { name, problem } => {
            assert!(!name.is_empty() && !problem.is_empty() && text.contains(name))
        }
        ParseError::Attribute { name, problem } => {
            assert!(!name.is_empty() && !problem.is_empty() && text.contains(name.as_str()))
        }
        ParseError::Json(why) => assert!(!why.is_empty()),
        ParseError::UnknownEventType(name) => {
            assert!(name.starts_with("dc_") || name.starts_with("hb_"))
        }
        ParseError::ForeignEventType(name) => {
            assert!(!name.starts_with("dc_") && !name.starts_with("hb_"))
        }
        ParseError::ForeignTopic { own, found, .. } => panic!("no topic was named: {own}, {found}"),
        ParseError::UnknownField(_) => {}
    }
}

/// A line with the type, then the payload.
pub fn usage(input: &[u8]) -> bool {
    let at = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let event_type = String::from_utf8_lossy(&input[..at]);
    match UsageQuantity::parse(&event_type, input.get(at + 1..).unwrap_or_default()) {
        Ok(quantity) => {
            assert_eq!(quantity.usage_type().as_str(), event_type);
            assert_eq!(
                UsageQuantity::parse(&event_type, quantity.to_data().to_string().as_bytes()),
                Ok(quantity)
            );
            assert_eq!(UsageQuantity::new(quantity.usage_type(), quantity.number()), Ok(quantity));
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}
