//! Headers and bodies of rejects.

use std::collections::HashMap;

use chrono::TimeDelta;
use tallyline::event::{Message, SIGNATURE, unsigned_headers};
use tallyline::ledger::{PruneKind, known};
use tallyline::operations::{OperationError, PruneExecution, PruneRequest, Resubmit, ShowReject};

use super::{World, broken, days, operator};
use crate::support::ledger::{DEPLOYMENT, act, ask, usage};

const KIND: PruneKind = PruneKind::RejectPayloads;

fn edited(id: i64, n: u32) -> Resubmit {
    let body = String::from_utf8(usage(DEPLOYMENT, n).to_message().payload.unwrap()).unwrap();
    Resubmit { ids: vec![id], edit: Some(body), ..Resubmit::default() }
}

#[tokio::test]
async fn bodies_of_ended_rejects_go_after_their_days_and_open_ones_stay() {
    let world = World::new().await;
    let tombstone = Message { payload: None, ..usage(DEPLOYMENT, 4).to_message() };
    let ids = world.take(vec![broken(1), broken(2), broken(3), tombstone]).await;
    world.discard(&[ids[0], ids[3]]).await;
    world.at(days(10));
    act(&world.operations, &edited(ids[1], 2), &operator()).await.unwrap();
    world.consume().await;

    world.at(days(180));
    assert_eq!(world.round().await, [].into(), "to the instant");
    world.at(days(180) + TimeDelta::microseconds(1));
    assert_eq!(world.round().await, [(KIND, 2)].into());
    assert_eq!(world.round().await, [].into(), "once");
    world.at(days(9_999));
    assert_eq!(world.round().await, [(KIND, 1)].into(), "the open one stays");
    let kept = "select count(*) from reject where headers is not null and payload is not null and state = 'open'";
    assert_eq!(world.number(kept).await, 1);
    let digests = "select count(*) from reject where payload is null and headers is null and headers_sha256 is not null
        and (payload_sha256 is null) = (cause = 'tombstone')";
    assert_eq!(world.number(digests).await, 3);
    assert_eq!(world.differences().await, []);
}

#[tokio::test]
async fn a_removed_body_is_said_and_not_resubmitted() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1), broken(2)]).await;
    world.discard(&ids).await;
    world.at(days(181));
    world.round().await;
    let shown = ask(&world.operations, &ShowReject { id: ids[0] }).await.unwrap();
    let removed = shown.reject.removed.as_ref().unwrap();
    assert_eq!(removed.to_string(), "headers and body were removed on 2026-01-29 after 181 days");
    assert!(shown.reject.payload.is_none() && shown.reject.headers.is_empty());
    let why = shown.if_resubmitted_reason.unwrap();
    assert!(why.contains("tallyline replay plan --topic"), "{why}");

    for force in [false, true] {
        for edit in [None, edited(ids[0], 1).edit] {
            let resubmit = Resubmit { ids: vec![ids[0]], edit, force, dry_run: false };
            let refused = act(&world.operations, &resubmit, &operator()).await.unwrap_err();
            assert!(matches!(refused, OperationError::Forbidden(_)), "{refused}");
            if force {
                let words = "headers and body of reject";
                assert!(refused.to_string().starts_with(words), "{refused}");
                assert!(refused.to_string().contains("@0, replay it"), "{refused}");
            }
        }
    }
}

#[tokio::test]
async fn a_resubmitted_record_that_is_not_read_yet_keeps_the_body() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1)]).await;
    act(&world.operations, &edited(ids[0], 1), &operator()).await.unwrap();
    world.at(days(400));
    assert_eq!(world.round().await, [].into(), "the log can still lose the record");
    world.consume().await;
    assert_eq!(world.round().await, [(KIND, 1)].into());
    assert_eq!(world.differences().await, []);
}

#[tokio::test]
async fn a_resubmitted_record_without_an_event_keeps_the_body() {
    let world = World::new().await;
    let ids = world.take(vec![broken(1)]).await;
    act(&world.operations, &edited(ids[0], 1), &operator()).await.unwrap();
    world.consume().await;
    world.tamper("delete from usage_event").await;
    world.at(days(400));
    assert_eq!(world.round().await, [].into(), "its only copy");
}

#[tokio::test]
async fn a_changed_body_stays_as_evidence_until_it_is_restored() {
    let world = World::new().await;
    world.take(vec![broken(1)]).await;
    let ids = world.take(vec![broken(2)]).await;
    world.discard(&ids).await;
    world.tamper("create table saved as select id, payload from reject").await;
    world.tamper("update reject set payload = 'another' where id = 1").await;
    let plan = async || {
        let plan = ask(&world.operations, &PruneRequest { at: None }).await.unwrap();
        (plan.kinds[0].rows, plan.kinds[0].kept, plan)
    };
    world.at(days(181));
    let (rows, kept, planned) = plan().await;
    assert_eq!((rows, kept), (2, 0), "bodies are compared when they are removed");
    let prune = PruneRequest { at: Some(planned.at) };
    let execution = PruneExecution { prune, hash: planned.hash.unwrap() };
    let pruned = act(&world.operations, &execution, &operator()).await.unwrap();
    assert_eq!((pruned.kinds[0].removed.rows, pruned.kinds[0].kept), (1, 1));
    let body = "select count(*) from reject where id = 1 and payload = 'another' and payload_removed_at is null";
    assert_eq!(world.number(body).await, 1);
    let found = world.differences().await;
    assert!(found.contains(&("row_changed".to_owned(), "reject 1".to_owned())), "{found:?}");

    let (rows, kept, planned) = plan().await;
    assert_eq!((rows, kept, planned.hash), (0, 1, None));
    world.tamper("update reject set payload = saved.payload from saved where saved.id = reject.id and payload_removed_at is null").await;
    assert_eq!(world.round().await, [].into(), "not compared again yet");
    world.at(days(212));
    world.round().await;
    assert_eq!(world.round().await, [(KIND, 1)].into());
    assert_eq!(world.differences().await, []);
}

#[tokio::test]
async fn a_discarded_record_is_recognized_without_its_body() {
    let world = World::new().await;
    let mut signed = broken(1);
    signed.headers.push((SIGNATURE.to_uppercase(), Some(b"v1:collector:k:AAAA".to_vec())));
    let ids = world.take(vec![signed.clone()]).await;
    world.discard(&ids).await;
    let mut other = broken(1);
    other.headers.push(("ce_note".to_owned(), None));
    let refused = async |message: &Message| {
        let messages: HashMap<_, _> = [("usage-1".to_owned(), message.clone())].into();
        let refused = world
            .ledger()
            .run(async |conn| known::refused_messages(conn, DEPLOYMENT, &messages).await);
        !refused.await.unwrap().is_empty()
    };
    let all = [signed, broken(1), other, broken(2)];
    for pruned in [false, true] {
        let mut answers = Vec::new();
        for message in &all {
            answers.push(refused(message).await);
        }
        assert_eq!(answers, [true, true, false, false], "pruned: {pruned}");
        world.at(days(181));
        world.round().await;
    }
}

#[tokio::test]
async fn the_schema_and_the_program_hash_headers_without_a_signature_alike() {
    let world = World::new().await;
    let value = |text: &str| Some(text.as_bytes().to_vec());
    let headers = [
        vec![],
        vec![(SIGNATURE.to_owned(), value("x"))],
        vec![
            ("a\0\"\\\u{7f}é\u{1f600}".to_owned(), None),
            ("Tallyline-Signature".to_owned(), None),
        ],
        vec![
            ("b".to_owned(), value("\0")),
            ("b".to_owned(), value("")),
            ("[,]".to_owned(), value("]")),
        ],
    ];
    for headers in headers {
        let message = Message { headers, ..Message::default() };
        let hash: Vec<u8> = sqlx::query_scalar("select unsigned_headers($1)")
            .bind(message.headers_json())
            .fetch_one(&world.database.pool)
            .await
            .unwrap();
        assert_eq!(hash, unsigned_headers(&message), "{:?}", message.headers);
    }
}
