//! Rows outside the batches' content that decide on money: each change by hand contradicts an act or
//! another row.

use tallyline::event::Topic;
use tallyline::ledger::checks::{self, CheckRequest};
use tallyline::ledger::{ActKind, NewAct, Subject, books, cutover, publications, retirements};
use uuid::Uuid;

use super::{Books, OPEN_REQUEST, differences};
use crate::export::{accept, publish, send_as};
use crate::support::ledger::{DEPLOYMENT, noon, partition};

/// A change of the ledger, and the kind of difference.
type Row = (&'static str, &'static str);

const ROWS: [Row; 22] = [
    // a verdict in a batch that the chain does not have
    (
        "alter table batch disable trigger all; alter table settlement disable trigger all;
         insert into settlement (source_id, event_id, batch_id, state) values (1, 'usage-0', 9999, 'published');
         update publication set state = 'published' where event_id = 'usage-0'",
        "row_of_no_batch",
    ),
    (
        "alter table operator_act disable trigger all;
         insert into operator_act (batch_id, acted_at, actor, act, subject, reason) values (9999, now(), 'x', 'retire', 'x', '')",
        "row_of_no_batch",
    ),
    (
        "alter table license disable trigger all; update license set batch_id = 9999",
        "row_of_no_batch",
    ),
    // an event that coderd never had
    (
        "alter table source_lost disable trigger all;
         insert into source_lost values (1, 'usage-0', 9999, (select max(id) from operator_act where act = 'recover'))",
        "lost_off_its_act",
    ),
    (
        "insert into source_lost select source_id, 'usage-0', batch_id, (select max(id) from operator_act where act = 'discard') from source_lost",
        "lost_off_its_act",
    ),
    ("update usage_event set gone_at = now() where id = 'usage-0'", "gone_off_its_act"),
    // the creation of a workspace
    (
        "update workspace_build set workspace_id = (select workspace_id from workspace_build where log_offset = 1),
             first_successful_start = true where log_offset = 9;
         update workspace_first_start set build_id = (select build_id from workspace_build where log_offset = 9)
         where build_id = (select build_id from workspace_build where log_offset = 1)",
        "first_start_changed",
    ),
    (
        "insert into first_start_change select source_id, workspace_id, (select min(id) from batch), null, gen_random_uuid()
             from workspace_first_start where build_id is not null",
        "first_start_off_its_change",
    ),
    // signatures
    ("update signature_cutover set first_offset = first_offset + 1", "cutover_off_its_act"),
    ("delete from signature_cutover", "cutover_off_its_act"),
    (
        "insert into signature_cutover values ('tallyline.agent-usage.v1', 7, 1, 1000, now())",
        "cutover_off_its_act",
    ),
    // retirements
    ("update source set retired_act_id = null", "retired_off_its_act"),
    (
        "update source set retired_act_id = (select min(id) from operator_act)",
        "retired_off_its_act",
    ),
    // the payload of a reject
    (
        "alter table reject drop constraint reject_removal_follows_its_end;
         update reject set payload_removed_at = now(), headers_sha256 = sha256(headers), payload_sha256 = sha256(payload),
             unsigned_headers_sha256 = unsigned_headers(headers), headers = null, payload = null where state = 'open';
         update prune_kind set rows = (select count(*) from reject where payload_removed_at is not null) where kind = 'reject_payloads'",
        "reject_removed_early",
    ),
    (
        "update reject set payload_removed_at = 'epoch', headers_sha256 = sha256(headers), payload_sha256 = sha256(payload),
             unsigned_headers_sha256 = unsigned_headers(headers), headers = null, payload = null where state <> 'open';
         update prune_kind set rows = 1 where kind = 'reject_payloads'",
        "reject_removed_early",
    ),
    (
        "update reject set payload_removed_at = now(), headers_sha256 = sha256(headers), payload_sha256 = sha256(payload),
             unsigned_headers_sha256 = unsigned_headers(headers), headers = null, payload = null where state <> 'open'",
        "removed_off_its_acts",
    ),
    ("update publication set removed_attempts = 1, attempts = 2 where state = 'published'", "removed_off_its_acts"),
    // a request without an answer
    (
        "update publication set unanswered = false where event_id = 'usage-4'",
        "publication_off_its_open_attempts",
    ),
    (
        "update publication set state = 'expired' where event_id = 'usage-4'",
        "publication_off_its_open_attempts",
    ),
    (
        "update publication_attempt set event_id = 'usage-0' where verdict is null",
        "request_off_its_events",
    ),
    ("update publication_request set open_batch_id = 9999 where open_batch_id is not null", "row_of_no_batch"),
    ("update reject set replay_batch_id = 9999", "row_of_no_batch"),
];

/// A ledger with further acts: signatures, a retirement.
async fn acted() -> Books {
    let books = Books::filled().await;
    let ends = [(partition(Topic::AgentUsage, 0), 30)];
    let begun = books.ledger.run(async |conn| cutover::begin(conn, &ends, noon()).await);
    begun.await.unwrap();
    let subject = DEPLOYMENT.to_string();
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Retire,
        subject: Subject::Named(&subject),
        reason: "a reason",
        detail: serde_json::json!({}),
    };
    let retired =
        books.ledger.run(async |conn| retirements::retire(conn, DEPLOYMENT, &act, noon()).await);
    assert!(retired.await.unwrap());
    books
}

#[tokio::test]
async fn rows_outside_the_chain_follow_from_acts_and_other_rows() {
    let books = acted().await;
    assert_eq!(books.contradictions().await, []);
    assert_eq!(differences(&books.chained(None).await), []);
    books.close().await;
    let mut missed = Vec::new();
    for (statement, kind) in ROWS {
        let books = books.changed(statement).await;
        let found = books.contradictions().await;
        if !found.iter().any(|row| row.kind == kind) {
            missed.push(format!("{statement}: expected {kind}, found {found:#?}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[tokio::test]
async fn every_audit_finds_a_batch_before_the_first() {
    let books = Books::filled().await;
    let head = books.head().await;
    books
        .tamper(
            "alter table batch disable trigger all; alter table batch drop constraint batch_sequence_is_positive;
             insert into batch (kind, sequence, recorded_at) values ('operator', 0, now())",
        )
        .await;
    let joint = books.chained(Some(head)).await;
    assert_eq!(differences(&joint)[0].0, "batch_outside_the_chain");
    let whole = books.ledger.run(books::add_up).await.unwrap();
    let request = CheckRequest::default();
    let step = books.ledger.run(async |conn| checks::log_joint(conn, &request).await);
    for found in [whole.differences, step.await.unwrap().known] {
        let kinds: Vec<_> = found.iter().map(|row| row.kind.as_ref()).collect();
        assert_eq!(kinds, ["batch_outside_the_chain"], "{found:?}");
    }
}

/// Each page has at most 5,000 rows.
#[tokio::test]
async fn the_pages_of_a_table_leave_out_no_row() {
    let books = Books::empty().await;
    let source_id = books.register().await;
    books
        .tamper(
            "insert into workspace_first_start (source_id, workspace_id, build_id)
             select 1, md5(n::text)::uuid, md5(n::text)::uuid from generate_series(1, 12000) n;
             insert into workspace_first_start values (1, '00000000-0000-0000-0000-000000000000', gen_random_uuid()),
                 (-32768, '00000000-0000-0000-0000-000000000000', gen_random_uuid())",
        )
        .await;
    let found = books.contradictions().await;
    let kinds = found.iter().filter(|row| row.kind == "first_start_without_its_build").count();
    assert_eq!((source_id, kinds, found.len()), (1, 12_002, 12_002));
}

/// A request that is answered in time is covered once, with its answer.
#[tokio::test]
async fn a_verdict_covers_only_requests_that_nothing_can_answer_any_more() {
    let books = Books::empty().await;
    let source_id = books.register().await;
    books.record(partition(Topic::AgentUsage, 0), 0).await;
    let ledger = &books.ledger;
    send_as(ledger, source_id, "usage-4", OPEN_REQUEST).await;
    let covered = async || {
        let query = "select open_batch_id is not null from publication_request where id = $1";
        let covered = sqlx::query_scalar::<_, bool>(query).bind(OPEN_REQUEST);
        covered.fetch_one(&ledger.pool).await.unwrap()
    };
    let release = async || {
        let ids: Vec<String> = (0..6).map(|n| format!("usage-{n}")).collect();
        let release =
            ledger.run(async |conn| publications::release(conn, source_id, "me", &ids).await);
        release.await.unwrap();
    };
    release().await;
    publish(ledger, source_id, "usage-1").await;
    assert!(!covered().await);
    books.tamper("update publication_request set sent_at = sent_at - interval '11 minutes' where batch_id is null").await;
    release().await;
    let next = Uuid::from_u128(9);
    send_as(ledger, source_id, "usage-0", next).await;
    accept(ledger, source_id, "usage-0", next).await;
    assert!(covered().await);
    assert_eq!(differences(&books.chained(None).await), []);
}
