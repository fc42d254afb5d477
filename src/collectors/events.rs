//! Converts coderd's rows to events.

use chrono::{DateTime, Datelike as _, Utc};
use serde_json::Value;
use uuid::Uuid;

use crate::coderd::{BuildRow, Time, UsageRow};
use crate::event::{
    BuildKind, Digest, Event, InputStage, MAX_TEXT_BYTES, Message, PREBUILDS_USER, ParseError,
    Payload, PrebuildClaimed, PublishMarks, Usage, UsageQuantity, WorkspaceBuildCompleted, YEARS,
    kind, parse,
};

/// Why a build row of coderd cannot become an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRow {
    /// A value that this version does not know: coderd is newer.
    #[error("build {build_id}: {field} is {value:?}, which this version does not know")]
    UnknownWord {
        /// `workspace_builds.id`
        build_id: Uuid,
        /// The column.
        field: &'static str,
        value: String,
    },
    /// A time outside [`YEARS`].
    #[error("build {build_id}: {field} is {value}, outside the years {} to {}", YEARS.start(), YEARS.end())]
    Time {
        /// `workspace_builds.id`
        build_id: Uuid,
        /// The column.
        field: &'static str,
        value: Time,
        /// The row with its own values: the consumer rejects it, and operators see the reject.
        message: Box<Message>,
    },
}

/// The time, if an event can have it.
fn countable(time: Time) -> Option<DateTime<Utc>> {
    time.instant().filter(|at| YEARS.contains(&at.year()))
}

pub fn build(deployment: Uuid, row: BuildRow) -> Result<WorkspaceBuildCompleted, InvalidRow> {
    let times = [
        ("created_at", Some(row.created_at)),
        ("started_at", row.started_at),
        ("completed_at", Some(row.completed_at)),
    ];
    let odd: Vec<(&'static str, Time)> = times
        .into_iter()
        .filter_map(|(field, time)| Some((field, time.filter(|time| countable(*time).is_none())?)))
        .collect();
    let build = build_with_known_words(row)?;
    match odd.first() {
        None => Ok(build),
        Some((field, value)) => {
            let (build_id, field, value) = (build.build_id, *field, *value);
            let event = Event { deployment, payload: Payload::Build(Box::new(build)) };
            Err(InvalidRow::Time {
                build_id,
                field,
                value,
                message: Box::new(with_times(&event, &odd)),
            })
        }
    }
}

/// The message of a build with coderd's own values in these fields. It has no attribute `time`, so
/// that the parser names the field itself.
fn with_times(event: &Event, times: &[(&'static str, Time)]) -> Message {
    let mut message = event.to_message();
    message.headers.retain(|(name, _)| name != "ce_time");
    let mut data: Value =
        serde_json::from_slice(message.payload.as_deref().unwrap_or_default()).unwrap_or_default();
    for (field, time) in times {
        data[*field] = time.to_string().into();
    }
    message.payload = Some(data.to_string().into_bytes());
    message
}

/// Uses 1970 for a time that an event cannot have.
fn build_with_known_words(row: BuildRow) -> Result<WorkspaceBuildCompleted, InvalidRow> {
    let unknown = |field, value: &str| InvalidRow::UnknownWord {
        build_id: row.build_id,
        field,
        value: value.to_owned(),
    };
    let time = |time| countable(time).unwrap_or(DateTime::UNIX_EPOCH);
    let stage = |value: Option<&str>| match value {
        None | Some("0") => Ok(None),
        Some("1") => Ok(Some(InputStage::Create)),
        Some("2") => Ok(Some(InputStage::Claim)),
        Some(other) => Err(unknown("prebuilt_workspace_stage", other)),
    };
    Ok(WorkspaceBuildCompleted {
        transition: row.transition.parse().map_err(|_| unknown("transition", &row.transition))?,
        status: row.status.parse().map_err(|_| unknown("job_status", &row.status))?,
        stage: stage(row.stage.as_deref())?,
        first_build_stage: stage(row.first_build_stage.as_deref())?,
        build_id: row.build_id,
        workspace_id: row.workspace_id,
        organization_id: row.organization_id,
        template_id: row.template_id,
        template_version_id: row.template_version_id,
        preset_id: row.preset_id,
        owner_id: row.owner_id,
        initiator_id: row.initiator_id,
        reason: row.reason,
        build_number: row.build_number,
        first_build_by_prebuilds_user: row.first_build_initiator_id == Some(PREBUILDS_USER),
        first_successful_start: row.first_successful_start,
        has_ai_task: row.has_ai_task,
        has_external_agent: row.has_external_agent,
        daily_cost: row.daily_cost,
        created_at: time(row.created_at),
        started_at: row.started_at.map(time),
        completed_at: time(row.completed_at),
        organization_name: row.organization_name,
        template_name: row.template_name,
        template_version_name: row.template_version_name,
        preset_name: row.preset_name,
        workspace_name: row.workspace_name,
        owner_name: row.owner_name,
    })
}

/// The prebuild claim of a build, if it has one. The job input's stage decides, or the fallback
/// rule.
#[must_use]
pub fn claim(build: &WorkspaceBuildCompleted) -> Option<PrebuildClaimed> {
    (kind(build) == BuildKind::PrebuildClaim).then(|| PrebuildClaimed::of(build))
}

/// A usage row as a message. An unknown type, an invalid payload or an invalid time travels
/// unchanged: usage is money. The consumer holds or rejects it, and operators see it.
#[must_use]
pub fn usage(deployment: Uuid, row: UsageRow) -> Message {
    let quantity = UsageQuantity::parse(&row.event_type, row.event_data.as_bytes());
    let mark = |mark: Option<Time>| mark.map(countable);
    let (
        Ok(quantity),
        Some(created_at),
        publish_started_at @ (None | Some(Some(_))),
        published_at @ (None | Some(Some(_))),
    ) = (quantity, countable(row.created_at), mark(row.publish_started_at), mark(row.published_at))
    else {
        return unread_usage(deployment, row);
    };
    let failure_message = row.failure_message.map(|text| clip(&text).to_owned());
    let marks = PublishMarks {
        publish_started_at: publish_started_at.flatten(),
        published_at: published_at.flatten(),
        failure_message,
    };
    let usage = Usage { id: row.id, quantity, created_at, marks };
    Event { deployment, payload: Payload::Usage(usage) }.to_message()
}

/// The digest of a usage row. It leaves out coderd's marks: an invalid time in a mark does not
/// change the event.
pub fn usage_digest(deployment: Uuid, row: UsageRow) -> Result<Digest, ParseError> {
    let row =
        UsageRow { publish_started_at: None, published_at: None, failure_message: None, ..row };
    Ok(parse(&usage(deployment, row))?.digest())
}

/// Of coderd's marks, sends only those with an invalid time: the others change while the row is the
/// same.
fn unread_usage(deployment: Uuid, row: UsageRow) -> Message {
    let header = |name: &str, value: String| (name.to_owned(), Some(value.into_bytes()));
    let mut headers = vec![
        header("ce_specversion", "1.0".into()),
        header("ce_id", row.id.clone()),
        header("ce_source", format!("/coder/{deployment}")),
        header("ce_type", row.event_type),
        header("ce_time", row.created_at.to_string()),
        header("content-type", "application/json".into()),
    ];
    let marks =
        [("ce_publishstartedat", row.publish_started_at), ("ce_publishedat", row.published_at)];
    let odd = marks
        .into_iter()
        .filter_map(|(name, mark)| Some((name, mark.filter(|mark| countable(*mark).is_none())?)));
    headers.extend(odd.map(|(name, mark)| header(name, mark.to_string())));
    Message {
        key: Some(format!("{deployment}:{}", row.id).into_bytes()),
        headers,
        payload: Some(row.event_data.into_bytes()),
        oversized: None,
    }
}

/// The id of a message of this deployment. It reads the headers only, so the message need not be a
/// valid event.
pub(super) fn id_from(deployment: Uuid, message: &Message) -> Option<String> {
    let header = |name: &str| {
        let value = message.headers.iter().find(|(header, _)| header == name)?.1.as_deref()?;
        str::from_utf8(value).ok()
    };
    let same_source = header("ce_source")? == format!("/coder/{deployment}");
    same_source.then(|| header("ce_id").map(str::to_owned)).flatten()
}

/// Cuts a failure message to an event's limit: it is only a label, and must not cost the event.
fn clip(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> BuildRow {
        let at = |seconds| Time::from(DateTime::from_timestamp(seconds, 0).unwrap());
        BuildRow {
            build_id: Uuid::from_u128(1),
            workspace_id: Uuid::from_u128(2),
            organization_id: Uuid::from_u128(3),
            template_id: Uuid::from_u128(4),
            template_version_id: Uuid::from_u128(5),
            preset_id: None,
            owner_id: Uuid::from_u128(6),
            initiator_id: Uuid::from_u128(6),
            transition: "start".into(),
            reason: "initiator".into(),
            status: "succeeded".into(),
            build_number: 2,
            stage: None,
            first_build_stage: None,
            first_build_initiator_id: Some(Uuid::from_u128(6)),
            first_successful_start: false,
            has_ai_task: None,
            has_external_agent: Some(false),
            daily_cost: 0,
            created_at: at(10),
            started_at: Some(at(11)),
            completed_at: at(12),
            organization_name: "one".into(),
            template_name: "docker".into(),
            template_version_name: "v1".into(),
            preset_name: String::new(),
            workspace_name: "w".into(),
            owner_name: "user-001".into(),
        }
    }

    fn usage_row(event_type: &str, data: &str) -> UsageRow {
        UsageRow {
            id: "one".into(),
            event_type: event_type.into(),
            event_data: data.into(),
            created_at: DateTime::from_timestamp(10, 0).unwrap().into(),
            publish_started_at: None,
            published_at: None,
            failure_message: None,
        }
    }

    #[test]
    fn the_stage_identifies_a_claim_for_any_initiator() {
        for initiator_id in [PREBUILDS_USER, Uuid::from_u128(6)] {
            let build = build(
                Uuid::nil(),
                BuildRow { stage: Some("2".into()), build_number: 4, initiator_id, ..row() },
            )
            .unwrap();
            let claim = claim(&build).expect("a claim");
            assert_eq!((claim.claimed_by, claim.stage), (build.owner_id, Some(InputStage::Claim)));
        }
    }

    #[test]
    fn without_a_stage_the_second_start_after_a_prebuild_is_the_claim() {
        let prebuilt = BuildRow { first_build_initiator_id: Some(PREBUILDS_USER), ..row() };
        assert!(claim(&build(Uuid::nil(), prebuilt.clone()).unwrap()).is_some());
        assert!(
            claim(&build(Uuid::nil(), BuildRow { build_number: 3, ..prebuilt.clone() }).unwrap())
                .is_none()
        );
        assert!(
            claim(&build(Uuid::nil(), BuildRow { transition: "stop".into(), ..prebuilt }).unwrap())
                .is_none()
        );
        assert!(claim(&build(Uuid::nil(), row()).unwrap()).is_none(), "a regular restart");
    }

    #[test]
    fn a_start_after_a_prebuild_with_a_stage_is_not_a_claim() {
        let restarted = BuildRow {
            first_build_initiator_id: Some(PREBUILDS_USER),
            first_build_stage: Some("1".into()),
            ..row()
        };
        assert!(
            claim(&build(Uuid::nil(), restarted.clone()).unwrap()).is_none(),
            "an administrator's retry"
        );
        assert!(
            claim(&build(Uuid::nil(), BuildRow { stage: Some("2".into()), ..restarted }).unwrap())
                .is_some()
        );
    }

    #[test]
    fn an_error_names_a_word_of_a_newer_coderd() {
        let error =
            build(Uuid::nil(), BuildRow { transition: "hibernate".into(), ..row() }).unwrap_err();
        assert!(error.to_string().contains("transition is \"hibernate\""));
        assert!(build(Uuid::nil(), BuildRow { stage: Some("3".into()), ..row() }).is_err());
        assert_eq!(
            build(Uuid::nil(), BuildRow { stage: Some("0".into()), ..row() }).unwrap().stage,
            None
        );
    }

    #[test]
    fn invalid_usage_is_appended_unchanged() {
        let held = usage(Uuid::nil(), usage_row("dc_gpu_hours_v1", r#"{"hours": 3}"#));
        assert_eq!(parse(&held), Err(ParseError::UnknownEventType("dc_gpu_hours_v1".into())));
        let rejected = usage(Uuid::nil(), usage_row("dc_managed_agents_v1", r#"{"count": 0}"#));
        assert!(matches!(parse(&rejected), Err(ParseError::Field { name: "count", .. })));
        assert!(
            parse(&usage(Uuid::nil(), usage_row("dc_managed_agents_v1", r#"{"count": 1}"#)))
                .is_ok()
        );
    }

    #[test]
    fn a_long_failure_message_is_cut_and_the_event_is_kept() {
        let row = UsageRow {
            failure_message: Some("é".repeat(MAX_TEXT_BYTES)),
            ..usage_row("hb_ai_seats_v1", r#"{"count": 4}"#)
        };
        assert!(parse(&usage(Uuid::nil(), row)).is_ok());
    }
}
