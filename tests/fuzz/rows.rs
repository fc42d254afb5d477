//! Rows that coderd's database can have: any text without NUL, any time of PostgreSQL.

use std::collections::BTreeMap;

use chrono::DateTime;
use tallyline::coderd::{BuildRow, Time, UsageRow};
use tallyline::collectors::events::{self, InvalidRow};
use tallyline::event::{Event, Message, ParseError, Payload, UsageQuantity, parse};
use uuid::Uuid;

const DEPLOYMENT: Uuid = Uuid::from_u128(0xd1);

/// Lines `column: value`.
struct Row(BTreeMap<String, String>);

impl Row {
    fn of(input: &[u8]) -> Row {
        let text = String::from_utf8_lossy(input).replace('\0', "");
        Row(text
            .lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect())
    }

    fn text(&self, name: &str) -> String {
        self.0.get(name).cloned().unwrap_or_default()
    }

    fn optional<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.0.get(name)?.parse().ok()
    }

    /// Microseconds since 1970: any `timestamptz`, including the infinities.
    fn time(&self, name: &str) -> Option<Time> {
        self.optional(name).map(Time::from_micros)
    }
}

/// A completed build. An unknown word is reported. Otherwise the row is an event that survives its
/// wire form, or a refusal that names the field.
pub fn build(input: &[u8]) -> bool {
    let row = Row::of(input);
    let id = |name| row.optional(name).unwrap_or(Uuid::from_u128(7));
    let time = |name| row.time(name).unwrap_or(Time::from(DateTime::UNIX_EPOCH));
    let row = BuildRow {
        build_id: id("build_id"),
        workspace_id: id("workspace_id"),
        organization_id: id("organization_id"),
        template_id: id("template_id"),
        template_version_id: id("template_version_id"),
        preset_id: row.optional("preset_id"),
        owner_id: id("owner_id"),
        initiator_id: id("initiator_id"),
        transition: row.text("transition"),
        reason: row.text("reason"),
        status: row.text("status"),
        build_number: row.optional("build_number").unwrap_or_default(),
        stage: row.optional("stage"),
        first_build_stage: row.optional("first_build_stage"),
        first_build_initiator_id: row.optional("first_build_initiator_id"),
        first_successful_start: row.text("first_successful_start") == "true",
        has_ai_task: row.optional("has_ai_task"),
        has_external_agent: row.optional("has_external_agent"),
        daily_cost: row.optional("daily_cost").unwrap_or_default(),
        created_at: time("created_at"),
        started_at: row.time("started_at"),
        completed_at: time("completed_at"),
        organization_name: row.text("organization_name"),
        template_name: row.text("template_name"),
        template_version_name: row.text("template_version_name"),
        preset_name: row.text("preset_name"),
        workspace_name: row.text("workspace_name"),
        owner_name: row.text("owner_name"),
    };
    match events::build(DEPLOYMENT, row) {
        Ok(build) => {
            let claim =
                events::claim(&build).map(|claim| is_read(&Payload::Claim(Box::new(claim))));
            is_read(&Payload::Build(Box::new(build))) && claim != Some(false)
        }
        Err(InvalidRow::Time { field, message, .. }) => {
            assert!(
                matches!(parse(&message), Err(ParseError::Field { .. } | ParseError::Oversized(_))),
                "{field}: {message:?}"
            );
            false
        }
        Err(unknown) => {
            let text = unknown.to_string();
            assert!(
                ["transition", "job_status", "prebuilt_workspace_stage"]
                    .iter()
                    .any(|field| text.contains(field)),
                "{text}"
            );
            false
        }
    }
}

fn is_read(payload: &Payload) -> bool {
    let event = Event { deployment: DEPLOYMENT, payload: payload.clone() };
    match parse(&event.to_message()) {
        Ok(read) => {
            assert_eq!(read, event);
            true
        }
        Err(ParseError::Field { name, .. }) => {
            assert!(!name.is_empty());
            false
        }
        Err(ParseError::Oversized(_)) => false,
        Err(other) => panic!("{other}: {event:?}"),
    }
}

/// A usage row. It travels unchanged, whether it is accepted, held or refused: it is money.
pub fn usage(input: &[u8]) -> bool {
    let row = Row::of(input);
    let created_at = row.time("created_at").unwrap_or(Time::from(DateTime::UNIX_EPOCH));
    let (id, event_type, event_data) =
        (row.text("id"), row.text("event_type"), row.text("event_data"));
    let message = events::usage(
        DEPLOYMENT,
        UsageRow {
            id: id.clone(),
            event_type: event_type.clone(),
            event_data: event_data.clone(),
            created_at,
            publish_started_at: row.time("publish_started_at"),
            published_at: row.time("published_at"),
            failure_message: row.optional("failure_message"),
        },
    );
    assert_eq!(
        (header(&message, "ce_id"), header(&message, "ce_type")),
        (id.as_str(), event_type.as_str())
    );
    match parse(&message) {
        Ok(Event { deployment, payload: Payload::Usage(usage) }) => {
            assert_eq!(
                (deployment, &usage.id, Time::from(usage.created_at)),
                (DEPLOYMENT, &id, created_at)
            );
            assert_eq!(
                UsageQuantity::parse(&event_type, event_data.as_bytes()),
                Ok(usage.quantity)
            );
            true
        }
        Ok(other) => panic!("a usage row became {other:?}"),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn header<'a>(message: &'a Message, name: &str) -> &'a str {
    let value = message
        .headers
        .iter()
        .find(|(header, _)| header == name)
        .and_then(|(_, value)| value.as_deref());
    std::str::from_utf8(value.expect("a header")).expect("text")
}
