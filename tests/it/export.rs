//! Usage files from a real ledger. This file computes their expected content without SQL.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::export::{Aggregate, Totals, TypeTotal, export_usage};
use tallyline::ledger::{
    Attempt, AttemptVerdict, Chain, Ledger, NewRequest, RequestOutcome, Sequence, Settlement,
    UsageRange, publication_requests, publications, snapshots,
};
use uuid::Uuid;

use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, arrival, lease_partition, noon, partition, record_batch,
    registered_ledger,
};

const HEADER: &str = "deployment_id,event_id,event_type,quantity,unit,created_at,publication_state,published_request_id,accepted_sequence,corrected_sequence\n";

fn usage(deployment: Uuid, id: &str, quantity: UsageQuantity, created_at: DateTime<Utc>) -> Event {
    Event {
        deployment,
        payload: Payload::Usage(Usage {
            id: id.to_owned(),
            quantity,
            created_at,
            marks: PublishMarks::default(),
        }),
    }
}

/// Records the events as one batch and returns its sequence.
pub async fn record(ledger: &Ledger, events: &[Event]) -> Sequence {
    let claim = lease_partition(ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let from = claim.next_offset;
    let arrivals: Vec<_> =
        (from..).zip(events).map(|(offset, event)| arrival(offset, event.clone())).collect();
    let next_offset = from + i64::try_from(events.len()).unwrap();
    let counts = record_batch(ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
    assert_eq!(usize::try_from(counts.accepted).unwrap(), events.len());
    ledger.run(snapshots::head).await.unwrap()
}

async fn exported(ledger: &Ledger, range: &UsageRange) -> (String, Totals) {
    let mut bytes = Vec::new();
    let totals = export_usage(ledger, range, &mut bytes).await.unwrap();
    (String::from_utf8(bytes).unwrap(), totals)
}

fn all(as_of: Sequence) -> UsageRange {
    UsageRange {
        from: DateTime::UNIX_EPOCH,
        to: noon() + TimeDelta::days(9999),
        source: None,
        as_of,
    }
}

#[tokio::test]
async fn a_file_holds_each_event_once_in_order_and_adds_up() {
    let (_database, ledger) = registered_ledger().await;
    let mut events = Vec::new();
    for n in 0..5_600_u32 {
        // equal times in both deployments, and one id that both have
        let created_at = noon() + TimeDelta::seconds(i64::from(n / 700));
        let number = u64::from(n % 97) + 1;
        let quantity = match n % 3 {
            0 => UsageQuantity::ManagedAgents(number),
            1 => UsageQuantity::AiSeats(number),
            _ => UsageQuantity::AgentRuntimeMs(u64::try_from(i64::MAX).unwrap() - number),
        };
        let deployment = if n % 2 == 0 { DEPLOYMENT } else { OTHER_DEPLOYMENT };
        let id = if n < 2 {
            "Both".to_owned()
        } else {
            format!("{}{n:x}", ["a", "B", "é", "_"][n as usize % 4])
        };
        events.push(usage(deployment, &id, quantity, created_at));
    }
    let sequence = record(&ledger, &events).await;

    let mut rows = Vec::new();
    let mut totals: BTreeMap<&str, (u64, u128, &'static str)> = BTreeMap::new();
    let mut seats = BTreeMap::from([(DEPLOYMENT, 0), (OTHER_DEPLOYMENT, 0)]);
    for event in &events {
        let Payload::Usage(usage) = &event.payload else { unreachable!("only usage") };
        let (event_type, unit) = match usage.quantity {
            UsageQuantity::ManagedAgents(_) => ("dc_managed_agents_v1", "agents"),
            UsageQuantity::AiSeats(_) => ("hb_ai_seats_v1", "seats"),
            UsageQuantity::AgentRuntimeMs(_) => ("hb_agent_runtime_v1", "ms"),
        };
        let number = usage.quantity.number();
        let (events, total, _) = totals.entry(event_type).or_insert((0, 0, unit));
        *events += 1;
        // seats are a level of their deployment: ten heartbeats of ten seats are ten seats
        if let UsageQuantity::AiSeats(number) = usage.quantity {
            let level = seats.get_mut(&event.deployment).unwrap();
            *level = number.max(*level);
            *total = seats.values().map(|level| u128::from(*level)).sum();
        } else {
            *total += u128::from(number);
        }
        let time = usage.created_at.format("%Y-%m-%dT%H:%M:%S.000000Z");
        let line = format!(
            "{},{},{event_type},{number},{unit},{time},pending,,{sequence},\n",
            event.deployment, usage.id
        );
        rows.push((usage.created_at, usage.id.clone(), event.deployment, line));
    }
    rows.sort();
    let expected = rows.iter().fold(HEADER.to_owned(), |text, (.., line)| text + line);

    let (first, exported_totals) = exported(&ledger, &all(sequence)).await;
    assert!(first == expected, "the file differs from the recorded usage");
    assert_eq!(
        exported(&ledger, &all(sequence)).await,
        (first, exported_totals.clone()),
        "two runs give the same bytes"
    );
    let types = totals.into_iter().map(|(event_type, (events, total, unit))| TypeTotal {
        event_type: event_type.parse().unwrap(),
        unit,
        aggregate: if unit == "seats" { Aggregate::Maximum } else { Aggregate::Sum },
        events,
        quantity: total.to_string(),
    });
    assert_eq!(exported_totals, Totals { events: 5_600, types: types.collect() });
}

#[tokio::test]
async fn the_range_includes_its_start_excludes_its_end_and_has_one_source() {
    let (_database, ledger) = registered_ledger().await;
    let tick = TimeDelta::microseconds(1);
    let (from, to) = (noon(), noon() + TimeDelta::hours(1));
    let at = |id, deployment, created_at| {
        usage(deployment, id, UsageQuantity::ManagedAgents(2), created_at)
    };
    let events = [
        at("before", DEPLOYMENT, from - tick),
        at("first", DEPLOYMENT, from),
        at("other", OTHER_DEPLOYMENT, from),
        at("last", DEPLOYMENT, to - tick),
        at("behind", DEPLOYMENT, to),
    ];
    let sequence = record(&ledger, &events).await;
    let ids = async |source| {
        let (text, totals) =
            exported(&ledger, &UsageRange { from, to, source, as_of: sequence }).await;
        let ids: Vec<String> =
            text.lines().skip(1).map(|line| line.split(',').nth(1).unwrap().to_owned()).collect();
        assert_eq!(totals.events, ids.len() as u64);
        ids
    };
    assert_eq!(ids(None).await, ["first", "other", "last"]);
    assert_eq!(ids(Some(DEPLOYMENT)).await, ["first", "last"]);
    assert_eq!(ids(Some(OTHER_DEPLOYMENT)).await, ["other"]);
    assert!(ids(Some(Uuid::nil())).await.is_empty());
}

#[tokio::test]
async fn later_batches_do_not_change_an_earlier_export() {
    let (_database, ledger) = registered_ledger().await;
    let one = |id: &str| usage(DEPLOYMENT, id, UsageQuantity::ManagedAgents(1), noon());
    let before = record(&ledger, &[one("published"), one("settled"), one("waits")]).await;
    let (then, _) = exported(&ledger, &all(before)).await;

    let source_id: i16 =
        sqlx::query_scalar("select id from source").fetch_one(&ledger.pool).await.unwrap();
    let settled = ledger
        .run(async |conn| {
            publications::settle(
                conn,
                source_id,
                "me",
                &["settled".to_owned()],
                Settlement::NotOurs,
                ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    assert_eq!(settled.not_ours, 1);
    let request_id = publish(&ledger, source_id, "published").await;
    let after = record(&ledger, &[one("later")]).await;

    assert_eq!(exported(&ledger, &all(before)).await.0, then);
    let mut expected = HEADER.to_owned();
    let rows = [
        ("later", "pending", String::new(), after),
        ("published", "published", request_id.to_string(), before),
    ];
    for (id, state, request, sequence) in rows.into_iter().chain([
        ("settled", "not_ours", String::new(), before),
        ("waits", "pending", String::new(), before),
    ]) {
        writeln!(expected, "{DEPLOYMENT},{id},dc_managed_agents_v1,1,agents,2025-08-01T12:00:00.000000Z,{state},{request},{sequence},")
            .unwrap();
    }
    assert_eq!(exported(&ledger, &all(after)).await.0, expected);
}

#[tokio::test]
async fn a_late_verdict_does_not_change_an_earlier_export() {
    let (_database, ledger) = registered_ledger().await;
    record(&ledger, &[usage(DEPLOYMENT, "late", UsageQuantity::ManagedAgents(1), noon())]).await;
    let source_id: i16 =
        sqlx::query_scalar("select id from source").fetch_one(&ledger.pool).await.unwrap();
    let request = send(&ledger, source_id, "late").await;
    let settled = ledger
        .run(async |conn| {
            publications::settle(
                conn,
                source_id,
                "me",
                &["late".to_owned()],
                Settlement::TooOld,
                ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    assert_eq!(settled.unknown, 1);
    let then = ledger.run(snapshots::head).await.unwrap();
    let (file, _) = exported(&ledger, &all(then)).await;
    assert!(file.contains(",unknown,,"), "{file}");

    accept(&ledger, source_id, "late", request).await;
    assert_eq!(
        exported(&ledger, &all(then)).await.0,
        file,
        "the same bytes as of the same sequence"
    );
    let now = ledger.run(snapshots::head).await.unwrap();
    let (file, _) = exported(&ledger, &all(now)).await;
    assert!(now.number > then.number && file.contains(&format!(",published,{request},")), "{file}");
}

/// Each event has its own history. Every sequence of the ledger gives its own file, which later
/// batches do not change.
#[tokio::test]
async fn every_sequence_has_its_own_states_and_first_requests() {
    let (_database, ledger) = registered_ledger().await;
    let ids = ["late", "refused", "twice", "changed"];
    let events = ids.map(|id| usage(DEPLOYMENT, id, UsageQuantity::ManagedAgents(1), noon()));
    record(&ledger, &events).await;
    let source_id: i16 =
        sqlx::query_scalar("select id from source").fetch_one(&ledger.pool).await.unwrap();
    let mut expected = BTreeMap::from(ids.map(|id| (id, ("pending", String::new()))));
    let mut files = Vec::new();
    let remember = async |files: &mut Vec<_>, expected: &BTreeMap<&str, (&str, String)>| {
        let sequence = ledger.run(snapshots::head).await.unwrap();
        let text = exported(&ledger, &all(sequence)).await.0;
        let states: BTreeMap<_, _> = text
            .lines()
            .skip(1)
            .map(|line| line.split(',').collect::<Vec<_>>())
            .map(|fields| (fields[1].to_owned(), (fields[6].to_owned(), fields[7].to_owned())))
            .collect();
        let expected: BTreeMap<_, _> = expected
            .iter()
            .map(|(id, (state, request))| {
                ((*id).to_owned(), ((*state).to_owned(), request.clone()))
            })
            .collect();
        assert_eq!(states, expected, "at {sequence}");
        files.push((sequence, text));
    };
    remember(&mut files, &expected).await;

    use AttemptVerdict::{Accepted, Refused};
    // (event, its request, its verdict); without a verdict the publication is settled as too old
    let steps = [
        ("refused", 1, Some(Refused), "refused"),
        ("late", 2, None, "unknown"),
        // two requests were in flight: the vendor's first acceptance is reported
        ("twice", 4, Some(Accepted), "published"),
        ("twice", 3, Some(Accepted), "published"),
        ("changed", 5, Some(Refused), "refused"),
        ("changed", 6, Some(Accepted), "published"),
        ("late", 2, Some(Accepted), "published"),
    ];
    for (id, request) in
        [("refused", 1), ("late", 2), ("twice", 3), ("twice", 4), ("changed", 5), ("changed", 6)]
    {
        send_as(&ledger, source_id, id, Uuid::from_u128(request)).await;
    }
    for (id, request, verdict, state) in steps {
        let request = Uuid::from_u128(request);
        match verdict {
            Some(verdict) => answer(&ledger, source_id, id, request, verdict).await,
            None => settle_as_too_old(&ledger, source_id, id).await,
        }
        let known = expected.get_mut(id).unwrap();
        known.0 = state;
        if verdict == Some(Accepted) && known.1.is_empty() {
            known.1 = request.to_string();
        }
        remember(&mut files, &expected).await;
    }
    for (sequence, text) in files {
        assert_eq!(
            exported(&ledger, &all(sequence)).await.0,
            text,
            "later facts change {sequence}"
        );
    }
}

async fn settle_as_too_old(ledger: &Ledger, source_id: i16, event_id: &str) {
    let (ids, too_old) = ([event_id.to_owned()], Settlement::TooOld);
    let settled = ledger
        .run(async |conn| {
            publications::settle(conn, source_id, "me", &ids, too_old, ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(settled.unknown, 1);
}

/// Sends one event by the ledger's own steps, up to the vendor's acceptance.
pub async fn publish(ledger: &Ledger, source_id: i16, event_id: &str) -> Uuid {
    let id = send(ledger, source_id, event_id).await;
    accept(ledger, source_id, event_id, id).await;
    id
}

async fn send(ledger: &Ledger, source_id: i16, event_id: &str) -> Uuid {
    let id = Uuid::from_u128(7);
    send_as(ledger, source_id, event_id, id).await;
    id
}

pub async fn send_as(ledger: &Ledger, source_id: i16, event_id: &str, id: Uuid) {
    let lease = Duration::from_secs(60);
    ledger
        .run(async |conn| {
            publications::lease(
                conn,
                source_id,
                "me",
                DateTime::UNIX_EPOCH,
                10,
                lease,
                ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    let request = NewRequest {
        id,
        source_id,
        license_sha256: [1; 32],
        event_ids: vec![event_id],
        holder: "me",
        lease,
    };
    assert!(
        ledger
            .run(async |conn| publication_requests::begin(conn, &request, ledger.clock.now()).await)
            .await
            .unwrap()
    );
}

pub async fn accept(ledger: &Ledger, source_id: i16, event_id: &str, id: Uuid) {
    answer(ledger, source_id, event_id, id, AttemptVerdict::Accepted).await;
}

async fn answer(
    ledger: &Ledger,
    source_id: i16,
    event_id: &str,
    id: Uuid,
    verdict: AttemptVerdict,
) {
    let attempt = Attempt {
        event_id: event_id.to_owned(),
        verdict,
        message: None,
        next_attempt_at: noon(),
        unanswered: false,
        held_for: None,
    };
    let (answered_at, attempts) = (Some(noon()), vec![attempt]);
    let outcome = RequestOutcome {
        id,
        source_id,
        holder: "me",
        answered_at,
        status: Some(200),
        error: None,
        attempts,
        lease: None,
    };
    ledger
        .run(async |conn| {
            publication_requests::record_outcome(conn, &outcome, ledger.clock.now()).await
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_formula_in_an_id_stays_text() {
    let (_database, ledger) = registered_ledger().await;
    let ids = ["=cmd|'/c calc'!A1", "+1", "a,\"b\"\nc", "'quoted"];
    let events: Vec<Event> = ids
        .iter()
        .map(|id| usage(DEPLOYMENT, id, UsageQuantity::ManagedAgents(1), noon()))
        .collect();
    let sequence = record(&ledger, &events).await;
    let (text, _) = exported(&ledger, &all(sequence)).await;
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let fields: Vec<String> =
        reader.records().map(|record| record.unwrap()[1].to_owned()).collect();
    // in the byte order of the ids: ' + = a
    assert_eq!(fields, ["''quoted", "'+1", "'=cmd|'/c calc'!A1", "a,\"b\"\nc"]);
}
