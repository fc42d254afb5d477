//! Rejects: operators list, correct, resubmit or discard refused records, and the books show
//! it.

mod balance;
mod crash;
mod statements;
mod walk;

use std::collections::BTreeMap;

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::consumer;
use tallyline::event::{
    Event, Message, Payload, RejectCause, Topic, TopicPartition, Usage, UsageQuantity,
};
use tallyline::ledger::{
    Arrival, Chain, Counts, Disposition, Ledger, LedgerSettings, OpenRejects, Refusal,
    RejectProperty, books, reject_counts, rejects,
};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings, Record};
use tallyline::operations::{
    Actor, AdmitRejects, CountRejects, DiscardRejects, ListRejects, OperationError, Operations,
    PredictedDisposition, Reject, Resubmit, Resubmitted, ShowReject, WhichRejects,
};

use crate::journey::site::Backend;
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, act, ask, build, lease_partition, ledger, migrated, noon,
    operations, partition, record_batch, refused, register, usage,
};
use crate::support::{self, Database};

/// A ledger and a log, and the operations on both.
struct Site {
    operations: Operations,
    database: Database,
}

impl Site {
    async fn new(backend: Backend) -> Site {
        let database = migrated().await;
        let settings = LedgerSettings { url: database.url.clone(), connections: 4 };
        let ledger = Ledger::open(&settings, Clock::manual(noon())).unwrap();
        let log = match backend {
            Backend::Postgres => Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()),
            Backend::Kafka => {
                let kafka = support::kafka();
                Log::kafka(KafkaSettings {
                    topic_prefix: kafka.prefix.clone(),
                    ..KafkaSettings::new(&kafka.brokers)
                })
                .unwrap()
            }
        };
        log.create_topics(1).await.unwrap();
        register(&ledger, &[DEPLOYMENT, OTHER_DEPLOYMENT]).await;
        Site { operations: operations(&ledger, &log), database }
    }

    async fn append(&self, messages: Vec<Message>) {
        self.operations.log.append(Topic::AgentUsage, messages).await.unwrap();
    }

    /// Records everything in the log, as a consumer does.
    async fn consume(&self) -> Counts {
        let (ledger, log) = (&self.operations.ledger, &self.operations.log);
        let mut counts = Counts::default();
        for topic in Topic::ALL {
            let partition = TopicPartition { topic, partition: 0 };
            let claim = lease_partition(ledger, partition, 0).await.unwrap();
            let records = log.read(partition, claim.next_offset, 10_000).await.unwrap();
            let Some(last) = records.last() else { continue };
            let next_offset = last.offset + 1;
            let arrivals: Vec<_> =
                records.into_iter().map(|record| consumer::read_from(topic, record)).collect();
            counts = counts
                + record_batch(ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
        }
        counts
    }

    /// Appends and records.
    async fn take(&self, messages: Vec<Message>) -> Counts {
        self.append(messages).await;
        self.consume().await
    }

    async fn list(&self, state: &str) -> Vec<Reject> {
        let which = WhichRejects { state: state.to_owned(), ..WhichRejects::default() };
        ask(&self.operations, &ListRejects { which, after: 0, limit: 100 }).await.unwrap().rejects
    }

    async fn resubmit(&self, request: Resubmit) -> Result<Resubmitted, OperationError> {
        act(&self.operations, &request, &operator()).await
    }

    async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.database.pool).await.unwrap()
    }
}

fn operator() -> Actor {
    Actor { name: "operator-1".to_owned(), reason: "a typo of the producer".to_owned() }
}

fn as_is(ids: &[i64]) -> Resubmit {
    Resubmit { ids: ids.to_vec(), ..Resubmit::default() }
}

fn with(id: i64, edit: &str) -> Resubmit {
    Resubmit { ids: vec![id], edit: Some(edit.to_owned()), ..Resubmit::default() }
}

fn with_body(event: &Event, body: &str) -> Message {
    Message { payload: Some(body.as_bytes().to_vec()), ..event.to_message() }
}

fn with_type(event: &Event, event_type: &str) -> Message {
    let mut message = event.to_message();
    let header = message.headers.iter_mut().find(|(name, _)| name == "ce_type").unwrap();
    header.1 = Some(event_type.as_bytes().to_vec());
    message
}

/// Checks that the operation was refused with these words.
fn assert_forbidden<T: std::fmt::Debug>(outcome: Result<T, OperationError>, words: &str) {
    match outcome {
        Err(OperationError::Forbidden(why)) => {
            assert!(why.contains(words), "{words:?} is not in {why:?}")
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn open_rejects_are_counted_by_disposition_and_cause() {
    let (_database, ledger) = ledger().await;
    assert_eq!(ledger.run(reject_counts::open).await.unwrap(), []);
    let claim = lease_partition(&ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let arrivals = [
        refused(0, Disposition::Rejected),
        refused(1, Disposition::Held),
        refused(2, Disposition::Rejected),
        refused(3, Disposition::Held),
    ];
    record_batch(&ledger, &Chain::Live(claim), &arrivals, 4).await.unwrap();
    for (offset, units, event_type, earlier) in [
        (0, None, "dc_managed_agents_v1", 0),
        (1, Some("7"), "dc_gpu_hours_v1", 60),
        (2, Some("18446744073709551615"), "dc_managed_agents_v1", 30),
        (3, Some("5"), "hb_ai_seats_v1", 0),
    ] {
        sqlx::query("update reject set units = $2::numeric, event_type = $3, recorded_at = recorded_at - $4 where log_offset = $1")
            .bind(i64::from(offset))
            .bind(units)
            .bind(event_type)
            .bind(TimeDelta::seconds(earlier))
            .execute(&ledger.pool)
            .await
            .unwrap();
    }
    let open = |disposition, units: &[(&str, u64)], earlier| OpenRejects {
        disposition,
        cause: RejectCause::Json,
        records: 2,
        units: units
            .iter()
            .map(|(unit, number)| ((*unit).to_owned(), *number))
            .collect::<BTreeMap<_, _>>(),
        oldest: noon() - TimeDelta::seconds(earlier),
    };
    let expected = [
        open(Disposition::Held, &[("seats", 5), ("unknown", 7)], 60),
        open(Disposition::Rejected, &[("agents", u64::MAX)], 30),
    ];
    assert_eq!(ledger.run(reject_counts::open).await.unwrap(), expected);
}

#[tokio::test]
async fn unbilled_amounts_are_read_from_invalid_records() {
    let site = Site::new(Backend::Postgres).await;
    let structured = usage(DEPLOYMENT, 9)
        .to_structured()
        .to_string()
        .replace("\"count\":1", "\"count\":8,\"colour\":\"blue\"");
    let content_type = ("content-type".to_owned(), Some(b"application/cloudevents+json".to_vec()));
    let mut other = usage(DEPLOYMENT, 4);
    let Payload::Usage(Usage { quantity, .. }) = &mut other.payload else {
        unreachable!("it is usage")
    };
    *quantity = UsageQuantity::ManagedAgents(41);
    let counts = site
        .take(vec![
            with_body(&usage(DEPLOYMENT, 1), r#"{"count": 3, "colour": "blue"}"#),
            with_body(&usage(DEPLOYMENT, 2), "no JSON"),
            with_type(&usage(DEPLOYMENT, 3), "dc_gpu_hours_v1"),
            usage(DEPLOYMENT, 4).to_message(),
            other.to_message(),
            Message {
                headers: vec![content_type],
                payload: Some(structured.into_bytes()),
                ..Message::default()
            },
        ])
        .await;
    assert_eq!((counts.accepted, counts.conflicts, counts.rejects, counts.held), (1, 1, 3, 1));
    let listed: Vec<_> = site
        .list("open")
        .await
        .into_iter()
        .map(|row| (row.event_id.unwrap(), row.units, row.unit))
        .collect();
    let unbilled = |id: &str, units: Option<u64>, unit: &str| {
        (id.to_owned(), units, units.map(|_| unit.to_owned()))
    };
    // usage-3 is the fourth, so it would have been seats: (3 % 3) + 1
    let expected = [
        unbilled("usage-1", Some(3), "agents"),
        unbilled("usage-2", None, ""),
        unbilled("usage-3", Some(1), "unknown"),
        unbilled("usage-4", Some(41), "agents"),
        unbilled("usage-9", Some(8), "agents"),
    ];
    assert_eq!(listed, expected);
    let by_disposition =
        CountRejects { which: WhichRejects::default(), by: RejectProperty::Disposition };
    let groups = ask(&site.operations, &by_disposition).await.unwrap().groups;
    let listed: Vec<_> = groups
        .iter()
        .map(|group| (group.value.as_deref().unwrap(), group.records, group.units.clone()))
        .collect();
    let units = |unit: &str, number| BTreeMap::from([(unit.to_owned(), number)]);
    assert_eq!(
        listed,
        [
            ("rejected", 3, units("agents", 11)),
            ("conflict", 1, units("agents", 41)),
            ("held", 1, units("unknown", 1))
        ]
    );
}

#[tokio::test]
async fn a_page_of_rejects_leads_to_the_next() {
    let site = Site::new(Backend::Postgres).await;
    let long = format!("\"{}é", "x".repeat(1_022));
    site.take((0..5).map(|n| with_body(&usage(DEPLOYMENT, n), &long)).collect()).await;
    let (mut after, mut ids) = (0, Vec::new());
    loop {
        let request = ListRejects { which: WhichRejects::default(), after, limit: 2 };
        let page = ask(&site.operations, &request).await.unwrap();
        assert!(page.rejects.len() <= 2);
        for row in page.rejects {
            let payload = row.payload.unwrap();
            assert_eq!(
                (payload.length, payload.cut, payload.text.unwrap().len()),
                (1_025, true, 1_023)
            );
            ids.push(row.event_id.unwrap());
        }
        match page.next_after {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(ids, ["usage-0", "usage-1", "usage-2", "usage-3", "usage-4"]);
    let wrong = ListRejects {
        which: WhichRejects { state: "ajar".into(), ..WhichRejects::default() },
        after: 0,
        limit: 1,
    };
    assert!(matches!(
        ask(&site.operations, &wrong).await,
        Err(OperationError::Invalid { field: "state", .. })
    ));
}

#[tokio::test]
async fn a_record_that_would_be_refused_again_is_resubmitted_only_by_force_and_is_a_new_reject() {
    let site = Site::new(Backend::Postgres).await;
    site.take(vec![with_body(&usage(DEPLOYMENT, 1), r#"{"count": 1, "colour": "blue"}"#)]).await;
    let id = site.list("open").await[0].id;
    assert_forbidden(site.resubmit(as_is(&[id])).await, "unknown field \"colour\"");
    assert_forbidden(site.resubmit(with(id, "{")).await, "would be rejected again");
    let dry = site.resubmit(Resubmit { dry_run: true, ..as_is(&[id]) }).await.unwrap();
    assert_eq!(
        (dry.dry_run, dry.records[0].predicted, dry.records[0].act_id),
        (true, PredictedDisposition::Rejected, None)
    );
    assert_eq!(
        (site.consume().await.records, site.number("select count(*) from operator_act").await),
        (0, 0),
        "nothing was done"
    );

    let forced = site.resubmit(Resubmit { force: true, ..as_is(&[id]) }).await.unwrap();
    assert!(forced.records[0].ended && forced.records[0].place.is_some());
    assert_eq!(site.consume().await.rejects, 1);
    let [old, new]: [Reject; 2] = site.list("all").await.try_into().unwrap();
    assert_eq!((old.state.as_str(), new.state.as_str(), new.offset), ("resubmitted", "open", 1));
    // linked by their event id, each way
    for (one, other) in [(old.id, new.id), (new.id, old.id)] {
        let shown = ask(&site.operations, &ShowReject { id: one }).await.unwrap();
        assert_eq!(shown.same_event.iter().map(|same| same.id).collect::<Vec<_>>(), [other]);
        assert_eq!(
            (shown.accepted_sequence, shown.if_resubmitted),
            (None, PredictedDisposition::Rejected)
        );
    }
}

#[tokio::test]
async fn large_headers_are_shown_with_the_reject_and_not_in_a_list() {
    let site = Site::new(Backend::Postgres).await;
    let mut large = with_body(&usage(DEPLOYMENT, 1), "{");
    let count = large.headers.len();
    large.headers.push(("trace".to_owned(), Some(vec![b'x'; 20_000])));
    site.take(vec![with_body(&usage(DEPLOYMENT, 2), "{"), large]).await;
    let listed = site.list("open").await;
    assert_eq!(listed.iter().map(|reject| reject.headers.len()).collect::<Vec<_>>(), [count, 0]);
    assert_eq!(
        ask(&site.operations, &ShowReject { id: listed[1].id }).await.unwrap().reject.headers.len(),
        count + 1
    );
}

#[tokio::test]
async fn a_conflict_is_open_until_it_is_discarded_and_the_accepted_event_remains() {
    let site = Site::new(Backend::Postgres).await;
    let event = build(DEPLOYMENT, 1);
    let mut longer = event.clone();
    let Payload::Build(build) = &mut longer.payload else { unreachable!("it is a build") };
    build.completed_at += TimeDelta::seconds(1);
    site.operations
        .log
        .append(Topic::WorkspaceBuilds, vec![event.to_message(), longer.to_message()])
        .await
        .unwrap();
    assert_eq!(site.consume().await.conflicts, 1);
    let id = site.list("open").await[0].id;
    for force in [false, true] {
        assert_forbidden(
            site.resubmit(Resubmit { force, ..as_is(&[id]) }).await,
            "the accepted event remains",
        );
    }
    let nameless = Actor { reason: " ".to_owned(), ..operator() };
    let discard = DiscardRejects { ids: vec![id] };
    let without = act(&site.operations, &discard, &nameless).await;
    assert!(matches!(without, Err(OperationError::Invalid { field: "reason", .. })), "{without:?}");
    let discarded = act(&site.operations, &discard, &operator()).await.unwrap();
    assert_eq!(discarded.ids, [id]);
    assert_forbidden(act(&site.operations, &discard, &operator()).await, "discarded by operator-1");

    let shown = ask(&site.operations, &ShowReject { id }).await.unwrap();
    assert!(shown.accepted_sequence.is_some());
    let acts: Vec<_> = shown
        .reject
        .acts
        .iter()
        .map(|act| (act.act.as_str(), act.actor.as_str(), act.reason.as_str()))
        .collect();
    assert_eq!(acts, [("discard", "operator-1", "a typo of the producer")]);
    let accepted = "select count(*) from workspace_build where completed_at = timestamptz '2025-08-01T11:56:57Z'";
    assert_eq!(site.number(accepted).await, 1, "17 s - 200 s before noon");
    assert_eq!(site.operations.ledger.run(books::add_up).await.unwrap().differences, []);
}

#[tokio::test]
async fn several_rejects_are_closed_all_or_none_and_an_unknown_one_is_named() {
    let site = Site::new(Backend::Postgres).await;
    site.take((1..4).map(|n| with_type(&usage(DEPLOYMENT, n), "something_else_v1")).collect())
        .await;
    let ids: Vec<i64> = site.list("open").await.iter().map(|row| row.id).collect();
    act(&site.operations, &DiscardRejects { ids: vec![ids[1]] }, &operator()).await.unwrap();
    assert_forbidden(
        act(&site.operations, &DiscardRejects { ids: ids.clone() }, &operator()).await,
        "is not open",
    );
    assert!(matches!(
        site.resubmit(as_is(&[])).await,
        Err(OperationError::Invalid { field: "ids", .. })
    ));
    for missing in [
        site.resubmit(as_is(&[ids[0], 999])).await.map(|_| ()),
        ask(&site.operations, &ShowReject { id: 999 }).await.map(|_| ()),
    ] {
        assert!(matches!(missing, Err(OperationError::NotFound(why)) if why.contains("999")));
    }
    assert_eq!(site.list("open").await.len(), 2);
    let two = site.resubmit(Resubmit { edit: Some("{}".into()), ..as_is(&[ids[0], ids[2]]) }).await;
    assert!(matches!(two, Err(OperationError::Invalid { field: "edit", .. })), "{two:?}");
}

#[tokio::test]
async fn a_discarded_reject_can_be_resubmitted_while_its_event_is_not_accepted() {
    let site = Site::new(Backend::Postgres).await;
    site.take(vec![with_body(&usage(DEPLOYMENT, 1), "broken")]).await;
    let id = site.list("open").await[0].id;
    act(&site.operations, &DiscardRejects { ids: vec![id] }, &operator()).await.unwrap();
    let edit = with(id, r#"{"count": 2}"#);
    assert_forbidden(site.resubmit(edit.clone()).await, "is not open");
    site.resubmit(Resubmit { force: true, ..edit.clone() }).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    assert_forbidden(site.resubmit(Resubmit { force: true, ..edit }).await, "accepted already");
    let shown = ask(&site.operations, &ShowReject { id }).await.unwrap();
    let ended: Vec<_> =
        shown.reject.acts.iter().map(|act| (act.act.as_str(), act.ended_it)).collect();
    assert_eq!(ended, [("discard", false), ("resubmit", true)]);
    assert_eq!(shown.reject.acts[1].detail["edit"], r#"{"count": 2}"#);
}

#[tokio::test]
async fn a_record_with_wrong_headers_is_replaced_by_a_whole_event() {
    let site = Site::new(Backend::Postgres).await;
    let event = usage(DEPLOYMENT, 1);
    let mut message = event.to_message();
    message.headers.retain(|(name, _)| name != "ce_time");
    site.take(vec![message]).await;
    let id = site.list("open").await[0].id;
    assert_forbidden(site.resubmit(as_is(&[id])).await, "attribute time is missing");
    let other = usage(DEPLOYMENT, 2).to_structured().to_string();
    assert!(matches!(
        site.resubmit(with(id, &other)).await,
        Err(OperationError::Invalid { field: "id", .. })
    ));
    site.resubmit(with(id, &event.to_structured().to_string())).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    let digest = site
        .operations
        .ledger
        .run(async |conn| rejects::accepted(conn, DEPLOYMENT, "usage-1").await)
        .await
        .unwrap()
        .unwrap()
        .1;
    assert_eq!(digest, event.digest());
}

#[tokio::test]
async fn held_usage_is_admitted_once_by_a_version_that_knows_it_with_any_disposition() {
    for backend in [Backend::Postgres, Backend::Kafka] {
        let site = Site::new(backend).await;
        let broken = with_body(&usage(DEPLOYMENT, 2), r#"{"count": 0}"#);
        let held = [
            usage(DEPLOYMENT, 1).to_message(),
            broken,
            with_type(&usage(DEPLOYMENT, 3), "dc_gpu_hours_v1"),
            usage(DEPLOYMENT, 4).to_message(),
        ];
        site.append(held.to_vec()).await;
        held_by_an_earlier_version(&site, 0).await;
        // coderd's collector of this version has already sent one of them again
        assert_eq!(site.take(vec![usage(DEPLOYMENT, 4).to_message()]).await.accepted, 1);
        let actor = Actor { name: "tallyline 9".to_owned(), reason: "knows the type".to_owned() };
        let admitted = act(&site.operations, &AdmitRejects {}, &actor).await.unwrap();
        assert_eq!((admitted.records, admitted.refused, admitted.left), (3, 1, 0));
        let counts = site.consume().await;
        assert_eq!((counts.records, counts.accepted, counts.rejects), (2, 1, 1), "{counts:?}");
        let states: Vec<_> = site
            .list("all")
            .await
            .into_iter()
            .map(|row| (row.event_id.unwrap(), row.disposition, row.state))
            .collect();
        let states: Vec<_> = states
            .iter()
            .map(|(id, disposition, state)| (id.as_str(), disposition.as_str(), state.as_str()))
            .collect();
        let expected = [
            ("usage-1", "held", "admitted"),
            ("usage-2", "held", "admitted"),
            ("usage-3", "held", "open"),
            ("usage-4", "held", "admitted"),
            ("usage-2", "rejected", "open"),
        ];
        assert_eq!(states, expected);
        let again = act(&site.operations, &AdmitRejects {}, &actor).await.unwrap();
        assert_eq!((again.records, site.consume().await.records), (0, 0));
        assert_eq!(site.operations.ledger.run(books::add_up).await.unwrap().differences, []);
    }
}

/// Records the partition's records as held, like an earlier version that does not know these types.
async fn held_by_an_earlier_version(site: &Site, number: i32) {
    let claim = lease_partition(&site.operations.ledger, partition(Topic::AgentUsage, number), 0)
        .await
        .unwrap();
    let records = site.operations.log.read(claim.partition, 0, 100).await.unwrap();
    let next_offset = records.last().unwrap().offset + 1;
    let refusal = |record: &Record| Refusal {
        disposition: Disposition::Held,
        cause: RejectCause::UnknownEventType,
        detail: format!("unknown event type, at {}", record.offset),
    };
    let arrivals = records.into_iter().map(|record| Arrival {
        event: Err(refusal(&record)),
        offset: record.offset,
        timestamp: record.timestamp,
        message: record.message,
        confirmed: false,
    });
    let arrivals: Vec<Arrival> = arrivals.collect();
    let counts = record_batch(&site.operations.ledger, &Chain::Live(claim), &arrivals, next_offset)
        .await
        .unwrap();
    assert_eq!(usize::try_from(counts.held), Ok(arrivals.len()));
}
