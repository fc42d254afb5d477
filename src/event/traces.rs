//! Facts that are readable even in a record that is not a valid event: its deployment, its id and
//! its unbilled usage.

use uuid::Uuid;

use super::MAX_PAYLOAD_BYTES;
use super::envelope::{Event, Payload};
use super::fields::{Fields, checked_id};
use super::message::{Message, attribute, deployment, parse};
use super::usage::UsageType;

/// The readable facts of a record. A doubled name, or text that is not valid in an event, is not
/// readable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces {
    /// The deployment in `source`.
    pub deployment: Option<Uuid>,
    pub id: Option<String>,
    pub event_type: Option<String>,
    /// The usage in its type's unit. It is the number field of a known type. In a Tallyman type
    /// that this version does not know, it is the whole number among the fields, if exactly one
    /// exists.
    pub units: Option<u64>,
}

impl Traces {
    /// The traces of an accepted event.
    #[must_use]
    pub fn of_event(event: &Event) -> Self {
        let units = if let Payload::Usage(usage) = &event.payload {
            Some(usage.quantity.number())
        } else {
            None
        };
        Traces {
            deployment: Some(event.deployment),
            id: Some(event.id()),
            event_type: Some(event.event_type().to_owned()),
            units,
        }
    }

    /// The traces of a record.
    #[must_use]
    pub fn of(message: &Message) -> Self {
        if let Ok(event) = parse(message) {
            return Traces::of_event(&event);
        }
        let body = message
            .payload
            .as_deref()
            .filter(|body| body.len() <= MAX_PAYLOAD_BYTES && message.oversized.is_none());
        let fields = body.and_then(|body| Fields::of(body).ok());
        if message.is_structured() {
            return fields.map(Traces::structured).unwrap_or_default();
        }
        let attribute = |name| attribute(message, name).ok().flatten().map(str::to_owned);
        Traces::from_parts(attribute("source"), attribute("id"), attribute("type"), fields)
    }

    fn structured(mut outer: Fields<'_>) -> Self {
        let data = outer.take("data").and_then(|data| Fields::from_value(data, "data").ok());
        let mut attribute = |name| outer.optional_text(name).ok().flatten();
        let [source, id, event_type] = ["source", "id", "type"].map(&mut attribute);
        Traces::from_parts(source, id, event_type, data)
    }

    fn from_parts(
        source: Option<String>,
        id: Option<String>,
        event_type: Option<String>,
        data: Option<Fields<'_>>,
    ) -> Self {
        let valid = |text: &String| !text.is_empty() && checked_id("", text).is_ok();
        let event_type = event_type.filter(valid);
        let units =
            event_type.as_deref().zip(data).and_then(|(event_type, data)| units(event_type, data));
        Traces {
            deployment: source.and_then(|source| deployment(&source).ok()),
            id: id.filter(valid),
            event_type,
            units,
        }
    }
}

fn units(event_type: &str, mut data: Fields<'_>) -> Option<u64> {
    match event_type.parse::<UsageType>() {
        Ok(usage_type) => data.take(usage_type.field())?.unsigned(),
        Err(_) if UsageType::has_usage_prefix(event_type) => data.only_whole()?.unsigned(),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(event_type: &str, body: &str) -> Message {
        let header = |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec()));
        let source = format!("/coder/{}", Uuid::from_u128(7));
        let headers = vec![
            header("ce_id", "one"),
            header("ce_source", &source),
            header("ce_type", event_type),
        ];
        Message { headers, payload: Some(body.as_bytes().to_vec()), ..Message::default() }
    }

    #[test]
    fn units_come_from_the_number_field_even_if_other_fields_are_wrong() {
        let rows = [
            ("dc_managed_agents_v1", r#"{"count": 3, "colour": "blue"}"#, Some(3)),
            ("dc_managed_agents_v1", r#"{"count": 0}"#, Some(0)),
            ("dc_managed_agents_v1", r#"{"count": -3}"#, None),
            ("dc_managed_agents_v1", r#"{"counts": 3}"#, None),
            ("dc_managed_agents_v1", r#"{"count": 3, "count": 4}"#, None),
            ("hb_ai_seats_v1", r#"{"count": 18446744073709551615}"#, Some(u64::MAX)),
            ("hb_agent_runtime_v1", r#"{"runtime_ms": 9, "count": 1}"#, Some(9)),
            ("hb_agent_runtime_v1", r#"{"count": 1}"#, None),
            ("dc_gpu_hours_v1", r#"{"hours": 12, "model": "h100"}"#, Some(12)),
            ("dc_gpu_hours_v1", r#"{"hours": 12, "cards": 2}"#, None),
            ("dc_gpu_hours_v1", r#"{"hours": 1.5}"#, None),
            ("hb_new_v1", r#"{"hours": {"n": 1}}"#, None),
            ("something_else_v1", r#"{"count": 3}"#, None),
            ("workspace_build_completed_v1", r#"{"daily_cost": 3}"#, None),
            ("dc_managed_agents_v1", "no JSON", None),
        ];
        for (event_type, body, units) in rows {
            let traces = Traces::of(&record(event_type, body));
            let expected = Traces {
                deployment: Some(Uuid::from_u128(7)),
                id: Some("one".into()),
                event_type: Some(event_type.into()),
                units,
            };
            assert_eq!(traces, expected, "{body}");
        }
    }

    #[test]
    fn a_structured_record_has_the_same_traces() {
        let body = r#"{"id": "one", "source": "/coder/00000000-0000-0000-0000-000000000007", "type": "hb_ai_seats_v1", "data": {"count": 4}}"#;
        let content_type = (
            "content-type".to_owned(),
            Some(b"application/cloudevents+json; charset=utf-8".to_vec()),
        );
        let message = Message {
            headers: vec![content_type],
            payload: Some(body.into()),
            ..Message::default()
        };
        let of = (
            Some(Uuid::from_u128(7)),
            Some("one".to_owned()),
            Some("hb_ai_seats_v1".to_owned()),
            Some(4),
        );
        assert_eq!(
            Traces::of(&message),
            Traces { deployment: of.0, id: of.1, event_type: of.2, units: of.3 }
        );
    }

    #[test]
    fn values_that_are_invalid_in_an_event_are_not_read() {
        let mut message = record("dc_managed_agents_v1", "{}");
        message.headers.push(("CE_ID".into(), Some(b"two".to_vec())));
        message.headers[1].1 = Some(b"/elsewhere".to_vec());
        assert_eq!(
            Traces::of(&message),
            Traces { event_type: Some("dc_managed_agents_v1".into()), ..Traces::default() }
        );
        message.headers = vec![
            ("ce_id".into(), Some(b"\0".to_vec())),
            ("ce_type".into(), Some(b"\xff".to_vec())),
        ];
        assert_eq!(Traces::of(&message), Traces::default());
        assert_eq!(Traces::of(&Message::default()), Traces::default());
    }
}
