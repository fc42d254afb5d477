//! Pins the wire form and the digest. These texts and numbers were computed independently of the
//! code and never change.

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

const DEPLOYMENT: &str = "00000000-0000-0000-0000-0000000000d1";

fn build() -> WorkspaceBuildCompleted {
    WorkspaceBuildCompleted {
        build_id: id(1),
        workspace_id: id(2),
        organization_id: id(3),
        template_id: id(4),
        template_version_id: id(5),
        preset_id: Some(id(6)),
        owner_id: id(7),
        initiator_id: id(8),
        transition: Transition::Start,
        reason: "initiator".into(),
        status: BuildStatus::Succeeded,
        build_number: 2,
        stage: Some(InputStage::Claim),
        first_build_by_prebuilds_user: true,
        first_build_stage: Some(InputStage::Create),
        first_successful_start: false,
        has_ai_task: None,
        has_external_agent: Some(false),
        daily_cost: 7,
        created_at: at("2026-03-01T10:00:00Z"),
        started_at: Some(at("2026-03-01T10:00:01.5Z")),
        completed_at: at("2026-03-01T10:01:00.000001Z"),
        organization_name: "acme".into(),
        template_name: "docker".into(),
        template_version_name: "v1".into(),
        preset_name: "large".into(),
        workspace_name: "dev".into(),
        owner_name: "user-001".into(),
    }
}

fn build_event(build: WorkspaceBuildCompleted) -> Event {
    Event { deployment: DEPLOYMENT.parse().unwrap(), payload: Payload::Build(Box::new(build)) }
}

fn claim_event() -> Event {
    let claim = PrebuildClaimed {
        build_id: id(1),
        workspace_id: id(2),
        organization_id: id(3),
        template_id: id(4),
        template_version_id: id(5),
        preset_id: None,
        claimed_by: id(7),
        initiator_id: id(8),
        build_number: 2,
        stage: None,
        status: BuildStatus::Failed,
        created_at: at("2026-03-01T10:00:00Z"),
        started_at: None,
        completed_at: at("2026-03-01T10:01:00.000001Z"),
        organization_name: "acme".into(),
        template_name: "docker".into(),
        preset_name: String::new(),
    };
    Event { deployment: DEPLOYMENT.parse().unwrap(), payload: Payload::Claim(Box::new(claim)) }
}

fn usage_event() -> Event {
    let usage = Usage {
        id: "hb_agent_runtime_v1:2026-03-01_10:00:00".into(),
        quantity: UsageQuantity::AgentRuntimeMs(3_600_000),
        created_at: at("2026-03-01T10:00:00Z"),
        marks: PublishMarks {
            published_at: Some(at("2026-03-01T11:07:00.25Z")),
            ..PublishMarks::default()
        },
    };
    Event { deployment: DEPLOYMENT.parse().unwrap(), payload: Payload::Usage(usage) }
}

fn headers(message: &Message) -> Vec<(String, String)> {
    message
        .headers
        .iter()
        .map(|(name, value)| (name.clone(), String::from_utf8(value.clone().unwrap()).unwrap()))
        .collect()
}

fn body(message: &Message) -> Value {
    serde_json::from_slice(message.payload.as_ref().unwrap()).unwrap()
}

/// The binary form of `event` with its data changed.
fn with_data(event: &Event, change: impl FnOnce(&mut Value)) -> Message {
    let mut message = event.to_message();
    let mut data = body(&message);
    change(&mut data);
    message.payload = Some(data.to_string().into_bytes());
    message
}

fn with_header(event: &Event, name: &str, value: Option<&str>) -> Message {
    let mut message = event.to_message();
    message.headers.retain(|(header, _)| header != name);
    message.headers.extend(value.map(|value| (name.to_owned(), Some(value.as_bytes().to_vec()))));
    message
}

#[test]
fn the_digests_are_pinned() {
    let hex = |event: &Event| hex::encode(event.digest());
    assert_eq!(
        hex(&build_event(build())),
        "a73bef3391282d6f055fae0cf9446356a0a58da950ea297a98a27e5f693472a0"
    );
    assert_eq!(
        hex(&claim_event()),
        "9c33ab7e99c71eaa2bc2d9ab40f6141698343bf2638a812e761c88a9b57292c0"
    );
    assert_eq!(
        hex(&usage_event()),
        "345641fe61d68588379d3d7e0de52f601b3dd662a0f5ea4b18322d04381edc8b"
    );
}

#[test]
fn the_digest_covers_all_fields_that_coderd_never_rewrites() {
    let same = build_event(build()).digest();
    let rewritten = WorkspaceBuildCompleted {
        owner_id: id(99),
        preset_id: None,
        reason: "autostop".into(),
        template_name: "renamed".into(),
        has_ai_task: Some(true),
        daily_cost: 0,
        first_build_stage: None,
        ..build()
    };
    assert_eq!(build_event(rewritten).digest(), same);
    let other: [WorkspaceBuildCompleted; 5] = [
        WorkspaceBuildCompleted { build_number: 3, ..build() },
        WorkspaceBuildCompleted { started_at: None, ..build() },
        WorkspaceBuildCompleted { stage: None, ..build() },
        WorkspaceBuildCompleted { status: BuildStatus::Failed, ..build() },
        WorkspaceBuildCompleted { completed_at: at("2026-03-01T10:01:00.000002Z"), ..build() },
    ];
    for build in other {
        assert_ne!(build_event(build).digest(), same);
    }
}

#[test]
fn the_wire_form_of_a_build_is_pinned() {
    let message = build_event(build()).to_message();
    assert_eq!(message.key.as_deref(), Some(id(2).to_string().as_bytes()));
    let expected = [
        ("ce_specversion", "1.0"),
        ("ce_id", "workspace_build_completed:00000000-0000-0000-0000-000000000001"),
        ("ce_source", "/coder/00000000-0000-0000-0000-0000000000d1"),
        ("ce_type", "workspace_build_completed_v1"),
        ("ce_time", "2026-03-01T10:01:00.000001Z"),
        ("content-type", "application/json"),
        ("ce_firstbuildstage", "create"),
    ];
    assert_eq!(
        headers(&message),
        expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
    );
    assert_eq!(
        body(&message),
        json!({
            "build_id": "00000000-0000-0000-0000-000000000001",
            "workspace_id": "00000000-0000-0000-0000-000000000002",
            "organization_id": "00000000-0000-0000-0000-000000000003",
            "template_id": "00000000-0000-0000-0000-000000000004",
            "template_version_id": "00000000-0000-0000-0000-000000000005",
            "preset_id": "00000000-0000-0000-0000-000000000006",
            "owner_id": "00000000-0000-0000-0000-000000000007",
            "initiator_id": "00000000-0000-0000-0000-000000000008",
            "transition": "start",
            "reason": "initiator",
            "status": "succeeded",
            "build_number": 2,
            "stage": "claim",
            "first_build_by_prebuilds_user": true,
            "first_successful_start": false,
            "has_ai_task": null,
            "has_external_agent": false,
            "daily_cost": 7,
            "created_at": "2026-03-01T10:00:00Z",
            "started_at": "2026-03-01T10:00:01.500Z",
            "completed_at": "2026-03-01T10:01:00.000001Z",
            "organization_name": "acme",
            "template_name": "docker",
            "template_version_name": "v1",
            "preset_name": "large",
            "workspace_name": "dev",
            "owner_name": "user-001",
        })
    );
}

#[test]
fn the_wire_form_of_usage_keeps_the_data_and_adds_the_marks() {
    let message = usage_event().to_message();
    assert_eq!(message.payload.as_deref(), Some(br#"{"runtime_ms":3600000}"#.as_slice()));
    assert_eq!(
        message.key.as_deref(),
        Some(format!("{DEPLOYMENT}:hb_agent_runtime_v1:2026-03-01_10:00:00").as_bytes())
    );
    let headers = headers(&message);
    assert!(headers.contains(&("ce_type".into(), "hb_agent_runtime_v1".into())));
    assert!(headers.contains(&("ce_publishedat".into(), "2026-03-01T11:07:00.250Z".into())));
}

#[test]
fn every_event_round_trips_in_both_content_modes() {
    for event in [build_event(build()), claim_event(), usage_event()] {
        assert_eq!(parse(&event.to_message()), Ok(event.clone()));
        let structured = Message {
            key: None,
            headers: vec![(
                "Content-Type".into(),
                Some(b"application/cloudevents+json; charset=UTF-8".to_vec()),
            )],
            payload: Some(event.to_structured().to_string().into_bytes()),
            oversized: None,
        };
        assert_eq!(parse(&structured), Ok(event.clone()));
        assert_eq!(Event::from_structured(&event.to_structured()), Ok(event));
    }
}

/// Each row has a record that is not exactly right, and the error that names the fault.
#[test]
fn each_invalid_record_is_refused_with_its_cause() {
    let event = build_event(build());
    let raw = |payload: &[u8]| Message { payload: Some(payload.to_vec()), ..event.to_message() };
    let field = |name: &'static str| move |error: &ParseError| matches!(error, ParseError::Field { name: found, .. } if *found == name);
    let attribute = |name: &'static str| move |error: &ParseError| matches!(error, ParseError::Attribute { name: found, .. } if found == name);
    type Expected = Box<dyn Fn(&ParseError) -> bool>;
    let mut doubled = event.to_message();
    doubled.headers.push(("CE_ID".into(), Some(b"other".to_vec())));
    let mut not_utf8 = event.to_message();
    not_utf8.headers[1].1 = Some(vec![0xff]);
    let rows: Vec<(&str, Message, Expected)> = vec![
        (
            "tombstone",
            Message { payload: None, ..event.to_message() },
            Box::new(|e| *e == ParseError::Tombstone),
        ),
        (
            "oversized",
            raw(&vec![b' '; MAX_PAYLOAD_BYTES + 1]),
            Box::new(|e| matches!(e, ParseError::Oversized(_))),
        ),
        (
            "unreadable batch",
            Message::of_unreadable_batch(3, 7),
            Box::new(|e| {
                e.cause() == RejectCause::Oversized && e.to_string().contains("offsets 3 to 7")
            }),
        ),
        ("empty", raw(b""), Box::new(|e| matches!(e, ParseError::Json(_)))),
        ("trailing data", raw(b"{} {}"), Box::new(|e| matches!(e, ParseError::Json(_)))),
        (
            "deep nesting",
            raw("[".repeat(10_000).as_bytes()),
            Box::new(|e| matches!(e, ParseError::Json(_))),
        ),
        (
            "key twice",
            raw(br#"{"a":1,"a":2}"#),
            Box::new(|e| matches!(e, ParseError::Json(text) if text.contains("\"a\""))),
        ),
        ("not an object", raw(b"[]"), Box::new(field("data"))),
        ("no id", with_header(&event, "ce_id", None), Box::new(attribute("id"))),
        ("id twice", doubled, Box::new(attribute("id"))),
        ("id not UTF-8", not_utf8, Box::new(attribute("id"))),
        (
            "another's id",
            with_header(&event, "ce_id", Some("workspace_build_completed:x")),
            Box::new(attribute("id")),
        ),
        (
            "old specversion",
            with_header(&event, "ce_specversion", Some("0.3")),
            Box::new(attribute("specversion")),
        ),
        (
            "foreign source",
            with_header(&event, "ce_source", Some("/other/1")),
            Box::new(attribute("source")),
        ),
        (
            "source no UUID",
            with_header(&event, "ce_source", Some("/coder/1")),
            Box::new(field("source")),
        ),
        (
            "foreign type",
            with_header(&event, "ce_type", Some("ping")),
            Box::new(|e| matches!(e, ParseError::ForeignEventType(_))),
        ),
        (
            "time differs",
            with_header(&event, "ce_time", Some("2026-03-01T10:01:00Z")),
            Box::new(attribute("time")),
        ),
        (
            "not JSON",
            with_header(&event, "content-type", Some("text/plain")),
            Box::new(attribute("datacontenttype")),
        ),
        (
            "unknown field",
            with_data(&event, |d| d["extra"] = json!(1)),
            Box::new(|e| *e == ParseError::UnknownField("extra".into())),
        ),
        (
            "missing field",
            with_data(&event, |d| d["reason"] = Value::Null),
            Box::new(field("reason")),
        ),
        (
            "NUL",
            with_data(&event, |d| d["preset_name"] = json!("a\0b")),
            Box::new(field("preset_name")),
        ),
        (
            "endless text",
            with_data(&event, |d| d["owner_name"] = json!("x".repeat(5000))),
            Box::new(field("owner_name")),
        ),
        (
            "year 1",
            with_data(&event, |d| d["created_at"] = json!("0001-01-01T00:00:00Z")),
            Box::new(field("created_at")),
        ),
        (
            "far future",
            with_data(&event, |d| d["started_at"] = json!("+12026-01-01T00:00:00Z")),
            Box::new(field("started_at")),
        ),
        (
            "nanoseconds",
            with_data(&event, |d| d["started_at"] = json!("2026-03-01T10:00:00.0000001Z")),
            Box::new(field("started_at")),
        ),
        (
            "braced UUID",
            with_data(&event, |d| d["owner_id"] = json!(format!("{{{}}}", id(7)))),
            Box::new(field("owner_id")),
        ),
        (
            "fraction",
            with_data(&event, |d| d["build_number"] = json!(1.5)),
            Box::new(field("build_number")),
        ),
        (
            "build 0",
            with_data(&event, |d| d["build_number"] = json!(0)),
            Box::new(field("build_number")),
        ),
        (
            "beyond 32 bits",
            with_data(&event, |d| d["daily_cost"] = json!(3_000_000_000_u64)),
            Box::new(field("daily_cost")),
        ),
        (
            "unknown stage of build 1",
            with_header(&event, "ce_firstbuildstage", Some("begin")),
            Box::new(field("firstbuildstage")),
        ),
        (
            "unknown word",
            with_data(&event, |d| d["status"] = json!("running")),
            Box::new(field("status")),
        ),
        (
            "NUL in a word",
            with_data(&event, |d| d["status"] = json!("a\0b")),
            Box::new(field("status")),
        ),
        (
            "a list for text",
            with_data(&event, |d| d["reason"] = json!(["a"])),
            Box::new(field("reason")),
        ),
        (
            "text for a flag",
            with_data(&event, |d| d["has_ai_task"] = json!("true")),
            Box::new(field("has_ai_task")),
        ),
        ("list of the fields", raw(b"[1]"), Box::new(field("data"))),
        (
            "first start of a failed build",
            with_data(&event, |d| {
                d["first_successful_start"] = json!(true);
                d["status"] = json!("failed");
            }),
            Box::new(field("first_successful_start")),
        ),
    ];
    for (name, message, expected) in rows {
        let error = parse(&message).expect_err(name);
        assert!(expected(&error), "{name}: {error:?}");
        assert!(!error.to_string().is_empty());
        assert!(!error.to_string().contains('\0'), "{name}: PostgreSQL does not accept {error:?}");
    }
}

#[test]
fn an_optional_field_may_be_missing_or_null() {
    let expected = build_event(WorkspaceBuildCompleted {
        preset_id: None,
        started_at: None,
        stage: None,
        has_ai_task: None,
        ..build()
    });
    let optional = ["preset_id", "started_at", "stage", "has_ai_task"];
    let null =
        with_data(&expected, |data| optional.iter().for_each(|name| data[*name] = Value::Null));
    let missing = with_data(&expected, |data| {
        optional.iter().for_each(|name| drop(data.as_object_mut().unwrap().remove(*name)))
    });
    assert_eq!([parse(&null), parse(&missing)], [Ok(expected.clone()), Ok(expected)]);
}

#[test]
fn usage_payloads_follow_tallymans_validity_rules() {
    let ok = |event_type, data: &str| UsageQuantity::parse(event_type, data.as_bytes());
    assert_eq!(ok("dc_managed_agents_v1", r#"{"count":1}"#), Ok(UsageQuantity::ManagedAgents(1)));
    assert_eq!(
        ok("dc_managed_agents_v1", r#"{"count":18446744073709551615}"#),
        Ok(UsageQuantity::ManagedAgents(u64::MAX))
    );
    assert_eq!(ok("hb_ai_seats_v1", r#"{"count":0}"#), Ok(UsageQuantity::AiSeats(0)));
    assert_eq!(
        ok("hb_agent_runtime_v1", r#"{"runtime_ms":0}"#),
        Ok(UsageQuantity::AgentRuntimeMs(0))
    );
    for (event_type, data) in [
        ("dc_managed_agents_v1", r#"{"count":0}"#),
        ("dc_managed_agents_v1", r#"{"count":"1"}"#),
        ("dc_managed_agents_v1", "{}"),
        ("dc_managed_agents_v1", r#"{"count":1,"extra":1}"#),
        ("dc_managed_agents_v1", r#"{"count":1} {}"#),
        ("dc_managed_agents_v1", r#"{"count":18446744073709551616}"#),
        ("hb_ai_seats_v1", r#"{"count":-1}"#),
        ("hb_ai_seats_v1", r#"{"count":9223372036854775808}"#),
        ("hb_agent_runtime_v1", r#"{"runtime_ms":-1}"#),
        ("hb_agent_runtime_v1", r#"{"count":1}"#),
    ] {
        assert!(ok(event_type, data).is_err(), "{event_type} {data}");
    }
    assert_eq!(ok("dc_new_v1", "{}"), Err(ParseError::UnknownEventType("dc_new_v1".into())));
}

#[test]
fn an_unknown_usage_type_is_distinguished_from_other_types_for_any_data() {
    for event_type in ["dc_future_v1", "hb_future_v9", "dc_managed_agents_v2"] {
        let message = with_header(&usage_event(), "ce_type", Some(event_type));
        assert_eq!(parse(&message), Err(ParseError::UnknownEventType(event_type.into())));
    }
}

#[test]
fn the_kind_of_a_build_follows_stage_then_fallback_and_never_the_claims_initiator() {
    let base = WorkspaceBuildCompleted {
        stage: None,
        build_number: 1,
        first_build_by_prebuilds_user: false,
        first_build_stage: None,
        ..build()
    };
    let pool = WorkspaceBuildCompleted {
        initiator_id: PREBUILDS_USER,
        first_build_by_prebuilds_user: true,
        ..base.clone()
    };
    let rows = [
        (base.clone(), BuildKind::RegularCreation),
        (WorkspaceBuildCompleted { build_number: 2, ..base.clone() }, BuildKind::Other),
        (
            WorkspaceBuildCompleted { transition: Transition::Stop, ..base.clone() },
            BuildKind::Other,
        ),
        (
            WorkspaceBuildCompleted { stage: Some(InputStage::Create), ..pool.clone() },
            BuildKind::PrebuildCreation,
        ),
        (pool.clone(), BuildKind::PrebuildCreation),
        (
            WorkspaceBuildCompleted {
                stage: Some(InputStage::Claim),
                build_number: 2,
                ..base.clone()
            },
            BuildKind::PrebuildClaim,
        ),
        (
            WorkspaceBuildCompleted {
                stage: Some(InputStage::Claim),
                build_number: 3,
                ..pool.clone()
            },
            BuildKind::PrebuildClaim,
        ),
        (
            WorkspaceBuildCompleted {
                build_number: 2,
                first_build_by_prebuilds_user: true,
                ..base.clone()
            },
            BuildKind::PrebuildClaim,
        ),
        (WorkspaceBuildCompleted { build_number: 2, ..pool.clone() }, BuildKind::PrebuildClaim),
        (
            WorkspaceBuildCompleted {
                build_number: 2,
                first_build_stage: Some(InputStage::Create),
                ..pool.clone()
            },
            BuildKind::Other,
        ),
        (WorkspaceBuildCompleted { build_number: 3, ..pool.clone() }, BuildKind::Other),
        (
            WorkspaceBuildCompleted { transition: Transition::Delete, build_number: 2, ..pool },
            BuildKind::Other,
        ),
    ];
    for (build, expected) in rows {
        assert_eq!(kind(&build), expected, "{build:?}");
    }
}

#[test]
fn a_duration_exists_only_where_the_job_ran() {
    for (status, started, expected) in [
        (BuildStatus::Succeeded, Some("2026-03-01T10:00:01.5Z"), Some(58_500_001)),
        (BuildStatus::Succeeded, None, None),
        (BuildStatus::Succeeded, Some("2026-03-01T10:01:00.000001Z"), Some(0)),
        (BuildStatus::Failed, Some("2026-03-01T10:01:00.000001Z"), None), // the job reaper's
        (BuildStatus::Succeeded, Some("2026-03-01T10:01:01Z"), Some(-999_999)),
    ] {
        let build = WorkspaceBuildCompleted { status, started_at: started.map(at), ..build() };
        assert_eq!(
            build.duration().and_then(|duration| duration.num_microseconds()),
            expected,
            "{build:?}"
        );
    }
}

prop_compose! {
    fn any_time()(micros in 0_i64..253_402_300_799_000_000) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(micros).unwrap()
    }
}

prop_compose! {
    fn any_build()(
        ids in proptest::array::uniform8(any::<u128>()),
        preset in any::<bool>(),
        transition in prop::sample::select(vec![Transition::Start, Transition::Stop, Transition::Delete]),
        status in prop::sample::select(vec![BuildStatus::Succeeded, BuildStatus::Failed, BuildStatus::Canceled]),
        stages in proptest::array::uniform2(prop::sample::select(vec![None, Some(InputStage::Create), Some(InputStage::Claim)])),
        flags in any::<(bool, Option<bool>, Option<bool>)>(),
        numbers in (1..i32::MAX, any::<i32>()),
        created_at in any_time(), started_at in prop::option::of(any_time()), completed_at in any_time(),
        names in proptest::array::uniform6("[^\0]{0,40}"),
        reason in "[^\0]{0,20}",
    ) -> WorkspaceBuildCompleted {
        let [organization_name, template_name, template_version_name, preset_name, workspace_name, owner_name] = names;
        WorkspaceBuildCompleted {
            build_id: id(ids[0]), workspace_id: id(ids[1]), organization_id: id(ids[2]), template_id: id(ids[3]),
            template_version_id: id(ids[4]), preset_id: preset.then_some(id(ids[5])), owner_id: id(ids[6]), initiator_id: id(ids[7]),
            transition, reason, status, build_number: numbers.0, stage: stages[0], first_build_by_prebuilds_user: flags.0, first_build_stage: stages[1],
            first_successful_start: flags.0 && transition == Transition::Start && status == BuildStatus::Succeeded,
            has_ai_task: flags.1, has_external_agent: flags.2, daily_cost: numbers.1, created_at, started_at, completed_at,
            organization_name, template_name, template_version_name, preset_name, workspace_name, owner_name,
        }
    }
}

proptest! {
    #[test]
    fn any_build_round_trips(build in any_build()) {
        let event = build_event(build);
        prop_assert_eq!(parse(&event.to_message()), Ok(event));
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        headers in prop::collection::vec(("(ce_)?[a-z-]{1,12}", prop::option::of(prop::collection::vec(any::<u8>(), 0..40))), 0..8),
        payload in prop::option::of(prop::collection::vec(any::<u8>(), 0..200)),
    ) {
        let _ = parse(&Message { headers, payload, ..Message::default() });
    }

    #[test]
    fn a_changed_byte_gives_the_same_event_another_event_or_an_error(build in any_build(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut message = build_event(build).to_message();
        let payload = message.payload.as_mut().unwrap();
        let at = at.index(payload.len());
        payload[at] = byte;
        if let Ok(event) = parse(&message) {
            prop_assert_eq!(parse(&event.to_message()), Ok(event));
        }
    }
}
