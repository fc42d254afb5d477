//! The request: events in Tallyman's wire form.

use chrono::{DateTime, Datelike as _, SubsecRound as _, Timelike as _, Utc};

use crate::event::UsageQuantity;

/// Tallyman's limit for one request.
pub const MAX_EVENTS_PER_REQUEST: usize = 100;

/// 0001-01-01T00:00:00Z, Go's zero time.
const GO_ZERO_TIME_MICROS: i64 = -62_135_596_800_000_000;

/// Why an event cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEvent {
    /// Tallyman requires an id.
    #[error("id is empty")]
    EmptyId,
    /// Tallyman refuses Go's zero time, and RFC 3339 has only the years 0 to 9999.
    #[error("created_at {0} is the zero time or outside the years 1 to 9999")]
    CreatedAt(DateTime<Utc>),
}

/// One usage event as sent: under coderd's own id, with coderd's own value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingEvent {
    id: String,
    quantity: UsageQuantity,
    created_at: DateTime<Utc>,
}

impl OutgoingEvent {
    /// An event that Tallyman's rules allow. `created_at` is when the usage happened, cut to whole
    /// microseconds.
    pub fn new(
        id: impl Into<String>,
        quantity: UsageQuantity,
        created_at: DateTime<Utc>,
    ) -> Result<Self, InvalidEvent> {
        let id = id.into();
        let created_at = created_at.trunc_subsecs(6);
        if id.is_empty() {
            return Err(InvalidEvent::EmptyId);
        }
        if !(1..=9999).contains(&created_at.year())
            || created_at.timestamp_micros() == GO_ZERO_TIME_MICROS
        {
            return Err(InvalidEvent::CreatedAt(created_at));
        }
        Ok(OutgoingEvent { id, quantity, created_at })
    }

    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When the usage happened.
    #[must_use]
    pub fn created_at(&self) -> DateTime<Utc> {
        self.created_at
    }

    /// The event as JSON, always the same bytes for the same event. Keys are in the order of
    /// Tallyman's type, without blanks. The time is in UTC with `Z` and at most six fractional
    /// digits without trailing zeros.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!(
            r#"{{"id":{},"event_type":"{}","event_data":{},"created_at":"{}"}}"#,
            serde_json::Value::from(self.id.as_str()),
            self.quantity.usage_type(),
            self.quantity.to_data(),
            wire_time(self.created_at),
        )
    }
}

fn wire_time(at: DateTime<Utc>) -> String {
    let mut text = at.format("%Y-%m-%dT%H:%M:%S").to_string();
    let micros = at.nanosecond() / 1000;
    if micros > 0 {
        text.push_str(format!(".{micros:06}").trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// The body of one request. Each event's bytes are those of [`OutgoingEvent::to_json`].
#[must_use]
pub fn request_body(events: &[OutgoingEvent]) -> Vec<u8> {
    let events: Vec<String> = events.iter().map(OutgoingEvent::to_json).collect();
    format!(r#"{{"events":[{}]}}"#, events.join(",")).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    fn event(id: &str, quantity: UsageQuantity, time: &str) -> Result<OutgoingEvent, InvalidEvent> {
        OutgoingEvent::new(id, quantity, at(time))
    }

    #[test]
    fn the_wire_form_is_pinned() {
        let agents = event("0b0f", UsageQuantity::ManagedAgents(1), "2025-08-01T12:00:00.120300Z")
            .expect("valid");
        let seats = event(
            "hb_ai_seats_v1:2025-03-10_08:00:00",
            UsageQuantity::AiSeats(0),
            "2025-03-10T08:03:04Z",
        )
        .expect("valid");
        let runtime = event(
            "a\"b\\\u{1}é",
            UsageQuantity::AgentRuntimeMs(3_600_000),
            "2025-03-10T12:00:00.000001+02:00",
        )
        .expect("valid");
        let expected = concat!(
            r#"{"events":["#,
            r#"{"id":"0b0f","event_type":"dc_managed_agents_v1","event_data":{"count":1},"created_at":"2025-08-01T12:00:00.1203Z"},"#,
            r#"{"id":"hb_ai_seats_v1:2025-03-10_08:00:00","event_type":"hb_ai_seats_v1","event_data":{"count":0},"created_at":"2025-03-10T08:03:04Z"},"#,
            r#"{"id":"a\"b\\\u0001é","event_type":"hb_agent_runtime_v1","event_data":{"runtime_ms":3600000},"created_at":"2025-03-10T10:00:00.000001Z"}"#,
            r#"]}"#,
        );
        assert_eq!(
            String::from_utf8(request_body(&[agents, seats, runtime])).expect("UTF-8"),
            expected
        );
        assert_eq!(request_body(&[]), br#"{"events":[]}"#);
    }

    #[test]
    fn events_that_tallyman_refuses_are_not_sent() {
        let (seats, no_runtime) = (UsageQuantity::AiSeats(1), UsageQuantity::AgentRuntimeMs(0));
        let now = "2025-08-01T00:00:00Z";
        assert_eq!(event("", seats, now), Err(InvalidEvent::EmptyId));
        assert!(
            event("a", UsageQuantity::ManagedAgents(u64::MAX), now).is_ok(),
            "the count is an unsigned 64-bit number"
        );
        assert!(event("a", no_runtime, now).is_ok(), "an idle hour is an event");
        let zero = "0001-01-01T00:00:00Z";
        assert_eq!(event("a", seats, zero), Err(InvalidEvent::CreatedAt(at(zero))));
        assert!(event("a", seats, "0001-01-01T00:00:00.000001Z").is_ok());
        assert!(event("a", seats, "+10000-01-01T00:00:00Z").is_err());
    }

    proptest! {
        #[test]
        fn every_event_reads_back_as_it_was(id in ".+", value in 1..=u64::MAX, micros in -62_135_596_799_999_999..=253_402_300_799_999_999_i64) {
            let created_at = DateTime::from_timestamp_micros(micros).expect("in range");
            let event = OutgoingEvent::new(id.clone(), UsageQuantity::ManagedAgents(value), created_at).expect("valid");
            let read: serde_json::Value = serde_json::from_str(&event.to_json()).expect("JSON");
            prop_assert_eq!(read["id"].as_str(), Some(id.as_str()));
            prop_assert_eq!(read["event_data"]["count"].as_u64(), Some(value));
            let time = read["created_at"].as_str().expect("text");
            prop_assert_eq!(DateTime::parse_from_rfc3339(time).expect("RFC 3339").to_utc(), created_at);
        }
    }
}
