//! Bad input: a test for each bad record of tests/reference/bad_input_rows.rs. A consumer records
//! the messages in a real ledger, between two good ones. `journey::bad_input` sends some of them
//! through both logs and a real process.

mod records;
pub mod table;

use tallyline::consumer;
use tallyline::event::{Event, Fact, Message, Topic};
use tallyline::ledger::{Arrival, Chain, Counts, Ledger, books, entries};
use tallyline::log::Record;

use crate::support::Database;
use crate::support::ledger::{
    DEPLOYMENT, build, lease_partition, noon, partition, record_batch, registered_ledger,
};

/// The disposition of one record.
#[derive(Debug, PartialEq)]
enum Outcome {
    Accepted,
    Duplicate,
    /// Disposition, cause, and the row's detail.
    Refused(String, String, String),
}

/// A ledger that has recorded two good builds with other records between them, all in one batch.
struct Recorded {
    _database: Database,
    ledger: Ledger,
    outcomes: Vec<Outcome>,
}

/// Reads and records the messages as a consumer does. Both good builds must be there, and every
/// refused record must be unchanged. The books must balance: a bad record costs nothing else of its
/// batch.
async fn recorded(messages: &[Message]) -> Recorded {
    recorded_as(messages, consumer::read).await
}

async fn recorded_as(messages: &[Message], read: impl Fn(Record) -> Arrival) -> Recorded {
    let (database, ledger) = registered_ledger().await;
    let (first, last) = (build(DEPLOYMENT, 9_000), build(DEPLOYMENT, 9_001));
    let all: Vec<Message> = [&[first.to_message()], messages, &[last.to_message()]].concat();
    let claim = lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let arrivals: Vec<_> = (0..)
        .zip(&all)
        .map(|(offset, message)| {
            read(Record { offset, timestamp: noon(), message: message.clone() })
        })
        .collect();
    let counts =
        record_batch(&ledger, &Chain::Live(claim), &arrivals, i64::try_from(all.len()).unwrap())
            .await
            .unwrap();

    let mut outcomes = Vec::new();
    for (offset, message) in (0..).zip(&all) {
        outcomes.push(outcome(&ledger, offset, message).await);
    }
    assert_eq!(counts, counted(&outcomes));
    assert_eq!(
        (&outcomes[0], &outcomes[all.len() - 1]),
        (&Outcome::Accepted, &Outcome::Accepted),
        "the good records around it"
    );
    let facts = events(&ledger).await;
    assert!(facts.contains(&first) && facts.contains(&last));
    assert_eq!(ledger.run(books::add_up).await.unwrap().differences, []);
    outcomes.remove(0);
    outcomes.pop();
    Recorded { _database: database, ledger, outcomes }
}

/// The expected counts of a batch with these dispositions.
fn counted(outcomes: &[Outcome]) -> Counts {
    let of = |holds: &dyn Fn(&Outcome) -> bool| {
        i32::try_from(outcomes.iter().filter(|one| holds(one)).count()).unwrap()
    };
    let refused = |disposition: &str| {
        of(&|one| matches!(one, Outcome::Refused(one, _, _) if one == disposition))
    };
    Counts {
        records: of(&|_| true),
        accepted: of(&|one| *one == Outcome::Accepted),
        duplicates: of(&|one| *one == Outcome::Duplicate),
        conflicts: refused("conflict"),
        rejects: refused("rejected"),
        held: refused("held"),
    }
}

type RefusedRow = (String, String, String, Option<Vec<u8>>, Option<Vec<u8>>, Vec<u8>);

async fn outcome(ledger: &Ledger, offset: i64, message: &Message) -> Outcome {
    let row: Option<RefusedRow> =
        sqlx::query_as("select disposition, cause, detail, record_key, payload, headers from reject where log_offset = $1")
            .bind(offset)
            .fetch_optional(&ledger.pool)
            .await
            .unwrap();
    let accepted: i64 = sqlx::query_scalar(
        "select count(*) from (select log_offset from workspace_build union all select log_offset from prebuild_claim
             union all select log_offset from usage_event) as events where log_offset = $1",
    )
    .bind(offset)
    .fetch_one(&ledger.pool)
    .await
    .unwrap();
    match row {
        None if accepted == 0 => Outcome::Duplicate,
        None => Outcome::Accepted,
        Some((disposition, cause, detail, key, payload, headers)) => {
            assert_eq!(accepted, 0, "the record at {offset} is in two places");
            assert_eq!(
                (key, payload),
                (message.key.clone(), message.payload.clone()),
                "the record is unchanged"
            );
            let headers: Vec<(String, Option<String>)> = serde_json::from_slice(&headers).unwrap();
            let names: Vec<&String> = message.headers.iter().map(|(name, _)| name).collect();
            assert_eq!(
                headers.iter().map(|(name, _)| name).collect::<Vec<_>>(),
                names,
                "the headers are unchanged"
            );
            Outcome::Refused(disposition, cause, detail)
        }
    }
}

async fn events(ledger: &Ledger) -> Vec<Event> {
    let entries =
        ledger.run(async |conn| entries::after(conn, 0, i64::MAX, 0).await).await.unwrap();
    let facts = entries.into_iter().flat_map(|entry| entry.facts);
    facts
        .filter_map(|fact| if let Fact::Event(event) = fact { Some(event) } else { None })
        .collect()
}

/// Checks that each message is refused with this disposition and cause, and that the row's detail
/// contains these words.
async fn all_refused(rows: Vec<(Message, &str)>, disposition: &str, cause: &str) {
    let messages: Vec<Message> = rows.iter().map(|(message, _)| message.clone()).collect();
    let recording = recorded(&messages).await;
    for ((_, words), outcome) in rows.iter().zip(&recording.outcomes) {
        let Outcome::Refused(found_disposition, found_cause, detail) = outcome else {
            panic!("accepted, though {words:?}")
        };
        assert_eq!(
            (found_disposition.as_str(), found_cause.as_str()),
            (disposition, cause),
            "{detail}"
        );
        assert!(detail.contains(words), "{words:?} is not in {detail:?}");
    }
}

/// Checks that every message is accepted.
async fn all_accepted(messages: &[Message]) -> Recorded {
    let recording = recorded(messages).await;
    assert!(
        recording.outcomes.iter().all(|outcome| *outcome == Outcome::Accepted),
        "{:?}",
        recording.outcomes
    );
    recording
}
