//! Edits of rejected records. An edit repairs a record but keeps it the same event. If the headers
//! are wrong, the edit must be a whole CloudEvent, which replaces them.

use crate::event::{Message, STRUCTURED, Traces, UsageType};
use crate::operations::OperationError;

/// Replaces the record's body by this text. A whole CloudEvent (a JSON object with a `specversion`)
/// also replaces the headers.
///
/// # Errors
/// [`OperationError::Invalid`] with the attribute that the edit must not change.
pub fn edited(original: &Message, text: &str) -> Result<Message, OperationError> {
    let invalid = |field, message: String| Err(OperationError::Invalid { field, message });
    if text.contains('\0') {
        return invalid("edit", "holds a NUL character, which no event may".to_owned());
    }
    let whole = serde_json::from_str::<serde_json::Value>(text)
        .is_ok_and(|event| event.get("specversion").is_some());
    let payload = Some(text.as_bytes().to_vec());
    let mut message = Message {
        key: original.key.clone(),
        headers: original.headers.clone(),
        payload,
        oversized: None,
    };
    if whole {
        message.headers = vec![("content-type".to_owned(), Some(STRUCTURED.as_bytes().to_vec()))];
    } else if original.is_structured() {
        return invalid(
            "edit",
            "the record is a whole CloudEvent in JSON: the edit must be one too".to_owned(),
        );
    }
    let (old, new) = (Traces::of(original), Traces::of(&message));
    let is = |new: Option<String>| {
        new.map_or_else(|| "cannot be read".to_owned(), |new| format!("is {new:?}"))
    };
    if old.id.is_some() && new.id != old.id {
        return invalid(
            "id",
            format!("must stay {:?}, and {}", old.id.unwrap_or_default(), is(new.id)),
        );
    }
    if let Some(deployment) = old.deployment
        && new.deployment != old.deployment
    {
        let new = new.deployment.map(|deployment| format!("/coder/{deployment}"));
        return invalid("source", format!("must stay \"/coder/{deployment}\", and {}", is(new)));
    }
    // an unknown type may be the fault; a held record is unbilled usage, and another type would
    // bill something else
    if let Some(event_type) = old.event_type.filter(|event_type| counts(event_type))
        && new.event_type.as_ref() != Some(&event_type)
    {
        return invalid("type", format!("must stay {event_type:?}, and {}", is(new.event_type)));
    }
    Ok(message)
}

fn counts(event_type: &str) -> bool {
    UsageType::has_usage_prefix(event_type) || crate::event::is_build_type(event_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "/coder/00000000-0000-0000-0000-000000000007";

    fn record(id: &str, source: &str, event_type: &str) -> Message {
        let headers = [("ce_id", id), ("ce_source", source), ("ce_type", event_type)];
        let headers = headers
            .map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec())))
            .to_vec();
        Message {
            key: Some(b"k".to_vec()),
            headers,
            payload: Some(b"broken".to_vec()),
            oversized: None,
        }
    }

    fn whole(id: &str, source: &str, event_type: &str) -> String {
        serde_json::json!({ "specversion": "1.0", "id": id, "source": source, "type": event_type, "data": {} }).to_string()
    }

    fn refused(original: &Message, text: &str) -> &'static str {
        match edited(original, text) {
            Err(OperationError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_body_is_replaced_and_the_headers_stay() {
        let original = record("one", SOURCE, "dc_managed_agents_v1");
        let edited = edited(&original, r#"{"count": 1}"#).unwrap();
        assert_eq!(edited, Message { payload: Some(br#"{"count": 1}"#.to_vec()), ..original });
    }

    #[test]
    fn a_whole_event_replaces_headers_and_keeps_what_the_record_is() {
        let original = record("one", SOURCE, "dc_managed_agents_v1");
        let text = whole("one", SOURCE, "dc_managed_agents_v1");
        let message = edited(&original, &text).unwrap();
        assert_eq!(
            message.headers,
            [("content-type".to_owned(), Some(STRUCTURED.as_bytes().to_vec()))]
        );
        assert_eq!(refused(&original, &whole("two", SOURCE, "dc_managed_agents_v1")), "id");
        assert_eq!(
            refused(
                &original,
                &whole(
                    "one",
                    "/coder/00000000-0000-0000-0000-000000000008",
                    "dc_managed_agents_v1"
                )
            ),
            "source"
        );
        assert_eq!(refused(&original, &whole("one", SOURCE, "hb_ai_seats_v1")), "type");
        // held: a known type would bill something else
        assert_eq!(
            refused(
                &record("one", SOURCE, "dc_gpu_v1"),
                &whole("one", SOURCE, "dc_managed_agents_v1")
            ),
            "type"
        );
        let build = record("one", SOURCE, "workspace_build_completed_v1");
        assert_eq!(refused(&build, &whole("one", SOURCE, "prebuild_claimed_v1")), "type");
    }

    #[test]
    fn what_could_not_be_read_may_be_given() {
        let text = whole("one", SOURCE, "dc_managed_agents_v1");
        for original in [
            record("one", "/elsewhere", "dc_managed_agents_v1"),
            record("", SOURCE, "dc_managed_agents_v1"),
            record("one", SOURCE, "managed_agents"),
            Message::default(),
        ] {
            assert!(edited(&original, &text).is_ok(), "{original:?}");
        }
    }

    #[test]
    fn a_structured_record_is_replaced_by_a_whole_event_only() {
        let content_type = ("content-type".to_owned(), Some(STRUCTURED.as_bytes().to_vec()));
        let body = whole("one", SOURCE, "dc_managed_agents_v1");
        let original = Message {
            headers: vec![content_type],
            payload: Some(body.into_bytes()),
            ..Message::default()
        };
        assert_eq!(refused(&original, r#"{"count": 1}"#), "edit");
        assert_eq!(refused(&original, &whole("two", SOURCE, "dc_managed_agents_v1")), "id");
    }
}
