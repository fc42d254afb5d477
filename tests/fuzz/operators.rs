//! Operators' input: instants, durations, ranges of the log, ids of events, edits of rejects.

use chrono::{DateTime, Datelike as _, SecondsFormat, TimeDelta};
use tallyline::api::body_of;
use tallyline::event::{Message, Topic, Traces};
use tallyline::operations::{self, Edge, EventId, LogRange, OperationError, chosen, edited};

pub fn instant(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let text = text.trim_end_matches('\n');
    match operations::instant(text) {
        Ok(instant) => {
            assert!((1970..=9999).contains(&instant.year()), "{instant}");
            assert_eq!(
                DateTime::from_timestamp_micros(instant.timestamp_micros()),
                Some(instant),
                "as PostgreSQL keeps it"
            );
            assert_eq!(
                operations::instant(&instant.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
                Ok(instant)
            );
            true
        }
        Err(problem) => {
            assert!(!problem.is_empty());
            false
        }
    }
}

pub fn duration(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let Some(duration) = operations::duration(text.trim_end_matches('\n')) else { return false };
    assert!(duration >= TimeDelta::zero(), "{duration}");
    let (days, within) = (duration.num_days(), duration - TimeDelta::days(duration.num_days()));
    if u32::try_from(days).is_ok() {
        let seconds = format!("{}.{:09}", within.num_seconds(), within.subsec_nanos());
        for written in [format!("P{days}DT{seconds}S"), format!("{days}d{seconds}s")] {
            assert_eq!(operations::duration(&written), Some(duration), "{written}");
        }
    }
    true
}

/// The body of a request for a range: it becomes positions in a log.
pub fn log_range(input: &[u8]) -> bool {
    let Ok((range, _)) = body_of::<LogRange>(input) else { return false };
    let edges = [&range.from, &range.until].map(|text| text.parse::<Edge>());
    for edge in &edges {
        match edge {
            Ok(edge) => assert_eq!(
                written(*edge).map(|text| text.parse()),
                written(*edge).map(|_| Ok(*edge))
            ),
            Err(problem) => assert!(!problem.is_empty()),
        }
    }
    let topics: Vec<_> = range
        .topics
        .iter()
        .map(|text| (text, chosen(text, |name| name.parse::<Topic>().ok())))
        .collect();
    for (text, topic) in &topics {
        match topic {
            Ok(chosen_one) => {
                let partitions = chosen_one
                    .partitions
                    .as_ref()
                    .map(|all| all.iter().map(i32::to_string).collect::<Vec<_>>().join(","));
                assert!(chosen_one.partitions.iter().flatten().all(|partition| *partition >= 0));
                let again = partitions.map_or(chosen_one.topic.name().to_owned(), |all| {
                    format!("{}:{all}", chosen_one.topic.name())
                });
                assert_eq!(
                    chosen(&again, |name| name.parse::<Topic>().ok()).as_ref(),
                    Ok(chosen_one),
                    "{text}"
                );
            }
            Err(problem) => {
                assert!(problem.contains(text.split(':').next().unwrap_or_default()), "{problem}")
            }
        }
    }
    edges.iter().all(Result::is_ok) && topics.iter().all(|(_, topic)| topic.is_ok())
}

/// The edge in an operator's words; None for a duration, which has its own target.
fn written(edge: Edge) -> Option<String> {
    match edge {
        Edge::Earliest => Some("earliest".to_owned()),
        Edge::Latest => Some("latest".to_owned()),
        Edge::Offset(offset) => {
            assert!(offset >= 0);
            Some(offset.to_string())
        }
        Edge::Time(time) => Some(time.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
        Edge::Ago(_) => None,
    }
}

/// The id of an event to explain.
pub fn event_id(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let text = text.trim_end_matches('\n');
    match EventId::parse(text) {
        Ok(id) => {
            assert_eq!(EventId::parse(&id.whole()).unwrap_or_else(|error| panic!("{error}")), id);
            assert!(
                id.topic != Topic::AgentUsage || id.whole() == text,
                "coderd's own id is not changed"
            );
            true
        }
        Err(error) => {
            assert!(matches!(error, OperationError::Invalid { field: "event_id", .. }), "{error}");
            false
        }
    }
}

/// A record in HTTP form, a line `---`, and the text that replaces its body, or all of it.
pub fn edit(input: &[u8]) -> bool {
    let at = input.windows(5).position(|part| part == b"\n---\n");
    let (record, text) = at.map_or((input, &[][..]), |at| (&input[..at], &input[at + 5..]));
    let original = Message { key: Some(b"key".to_vec()), ..crate::event::message(record) };
    match edited(&original, &String::from_utf8_lossy(text)) {
        Ok(message) => {
            assert_eq!(message.key, original.key, "it stays in its partition");
            let (old, new) = (Traces::of(&original), Traces::of(&message));
            assert!(old.id.is_none() || new.id == old.id, "{old:?} became {new:?}");
            assert!(
                old.deployment.is_none() || new.deployment == old.deployment,
                "{old:?} became {new:?}"
            );
            let money = old
                .event_type
                .as_ref()
                .is_some_and(|name| name.starts_with("dc_") || name.starts_with("hb_"));
            assert!(!money || new.event_type == old.event_type, "{old:?} became {new:?}");
            true
        }
        Err(OperationError::Invalid { field, message }) => {
            assert!(
                ["edit", "id", "source", "type"].contains(&field) && !message.is_empty(),
                "{field}: {message}"
            );
            false
        }
        Err(other) => panic!("{other}"),
    }
}
