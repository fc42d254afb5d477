//! The wire form on the receiver's side: strict.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A request with more events is refused.
pub const MAX_EVENTS: usize = 100;

/// 0001-01-01T00:00:00Z in seconds since 1970.
const GO_ZERO_TIME: i64 = -62_135_596_800;

const KNOWN_TYPES: [&str; 3] = ["dc_managed_agents_v1", "hb_ai_seats_v1", "hb_agent_runtime_v1"];

/// One event as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    pub id: String,
    pub event_type: String,
    pub event_data: serde_json::Value,
    pub created_at: DateTime<Utc>,
    /// The event's text, byte for byte.
    pub json: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request<'a> {
    #[serde(borrow)]
    events: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Event {
    id: String,
    event_type: String,
    event_data: serde_json::Value,
    created_at: String,
}

#[derive(Debug, Default, Serialize)]
pub struct Answer {
    pub accepted_events: Vec<Accepted>,
    pub rejected_events: Vec<Rejected>,
}

#[derive(Debug, Serialize)]
pub struct Accepted {
    pub id: String,
}

#[derive(Debug, Serialize)]
pub struct Rejected {
    pub id: String,
    pub message: String,
    pub permanent: bool,
}

/// Reads a request's body; `Err` contains the message of the 400. Each event must have an id, then
/// a known type, then a time other than Go's zero time. It does not read the event's data.
pub fn parse(body: &[u8]) -> Result<Vec<Received>, String> {
    let request: Request =
        serde_json::from_slice(body).map_err(|error| format!("decode request body: {error}"))?;
    if request.events.len() > MAX_EVENTS {
        return Err(format!(
            "{} events in one request, at most {MAX_EVENTS} are taken",
            request.events.len()
        ));
    }
    let numbered = request.events.into_iter().enumerate();
    numbered
        .map(|(number, raw)| {
            parse_event(raw.get()).map_err(|error| format!("event {number}: {error}"))
        })
        .collect()
}

pub fn parse_event(json: &str) -> Result<Received, String> {
    let event: Event = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let created_at = instant(&event.created_at).ok_or("created_at is not an RFC 3339 time")?;
    if event.id.is_empty() {
        return Err("id is required".to_owned());
    }
    if !KNOWN_TYPES.contains(&event.event_type.as_str()) {
        return Err(format!("unknown event type {:?}", event.event_type));
    }
    if created_at.timestamp() == GO_ZERO_TIME && created_at.timestamp_subsec_nanos() == 0 {
        return Err("created_at cannot be zero".to_owned());
    }
    let json = json.to_owned();
    Ok(Received {
        id: event.id,
        event_type: event.event_type,
        event_data: event.event_data,
        created_at,
        json,
    })
}

/// Go requires the `T` and the `Z` as capitals; chrono accepts more.
fn instant(text: &str) -> Option<DateTime<Utc>> {
    let plain = text.as_bytes().get(10) == Some(&b'T') && !text.ends_with('z');
    plain.then(|| DateTime::parse_from_rfc3339(text).ok()).flatten().map(|at| at.to_utc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"{"id":"a","event_type":"dc_managed_agents_v1","event_data":{"count":1},"created_at":"2025-08-01T02:00:00+02:00"}"#;

    fn parse_only(event: &str) -> Result<Vec<Received>, String> {
        parse(format!(r#"{{"events":[{event}]}}"#).as_bytes())
    }

    #[test]
    fn an_event_is_kept_byte_for_byte() {
        let spaced = GOOD.replace(":{", ": {  ");
        let events =
            parse(format!("{{ \"events\" : [ {spaced} , {GOOD} ] }}").as_bytes()).expect("good");
        assert_eq!((events[0].json.as_str(), events[1].json.as_str()), (spaced.as_str(), GOOD));
        assert_eq!(
            events[0].created_at,
            "2025-08-01T00:00:00Z".parse::<DateTime<Utc>>().expect("a time")
        );
    }

    #[test]
    fn a_body_that_is_not_exactly_the_request_is_refused() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"events":null}"#,
            r#"{"events":{}}"#,
            r#"{"events":[1]}"#,
            r#"{"events":[],"more":1}"#,
            r#"{"events":[]} x"#,
            r#"{"events":[],"events":[]}"#,
        ] {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
        for (what, with) in [
            (r#""id":"a""#, r#""id":1"#),
            (r#""id":"a","#, ""),
            (r#""id":"a","#, r#""id":"a","extra":true,"#),
            (r#""event_data":{"count":1},"#, ""),
            ("2025-08-01T02", "2025-08-01 of T02"),
            ("2025", "20250"),
            ("01T02", "01 02"),
            ("01T02", "01t02"),
            ("+02:00", ""),
        ] {
            assert!(parse_only(&GOOD.replace(what, with)).is_err(), "{what} as {with}");
        }
        assert_eq!(parse(br#"{"events":[]}"#).expect("good").len(), 0);
    }

    #[test]
    fn id_type_and_time_are_checked_in_that_order() {
        let bad_time = GOOD.replace("2025-08-01T02:00:00+02:00", "0001-01-01T00:00:00Z");
        let bad_type = bad_time.replace("dc_managed_agents_v1", "dc_new_v1");
        let bad_id = bad_type.replace(r#""id":"a""#, r#""id":"""#);
        assert_eq!(
            parse_only(&bad_time).expect_err("zero time"),
            "event 0: created_at cannot be zero"
        );
        assert_eq!(
            parse_only(&bad_type).expect_err("unknown type"),
            "event 0: unknown event type \"dc_new_v1\""
        );
        assert_eq!(parse_only(&bad_id).expect_err("empty id"), "event 0: id is required");
        assert!(
            parse_only(&GOOD.replace(r#"{"count":1}"#, r#"{"anything":[]}"#)).is_ok(),
            "data is not looked into"
        );
    }

    #[test]
    fn at_most_100_events_are_taken() {
        assert_eq!(parse_only(&[GOOD; 100].join(",")).expect("good").len(), 100);
        assert!(parse_only(&[GOOD; 101].join(",")).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&body);
        }

        #[test]
        fn no_damage_makes_the_parser_panic(position in 0_usize..150, byte: u8) {
            let mut body = format!(r#"{{"events":[{GOOD}]}}"#).into_bytes();
            if let Some(at) = body.get_mut(position) {
                *at = byte;
            }
            let _ = parse(&body);
        }
    }
}
