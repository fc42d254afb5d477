//! The chain of the ledger's batches, without the log: a changed, removed or added row is named. An
//! attacker who recomputes the chain, or removes the newest batches, is found by an earlier head.

mod coverage;
mod forged;

use std::time::Duration;

use chrono::TimeDelta;
use tallyline::audit::{Audit, Joint};
use tallyline::clock::Clock;
use tallyline::event::{Payload, Topic, TopicPartition, build_of};
use tallyline::ledger::{
    ActKind, Arrival, Baseline, BaselineRow, BatchPart, Chain, Correction, Difference, Disposition,
    Head, Ledger, LedgerSettings, LicenseChange, LicenseState, NewAct, NewCorrection,
    PublicationNow, PublicationState, RestoreEvidence, RowReading, Settlement, Subject, chain,
    corrections, head, licenses, losses, publications, rejects, restored, sources,
};
use tallyline::log::{Log, PostgresLogSettings};
use uuid::Uuid;

use crate::export::{publish, send_as};
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, arrival, event, lease_partition, migrated, newest_landmark, noon,
    partition, record_batch, refused, take_lease,
};
use crate::support::{self, Database};

struct Books {
    ledger: Ledger,
    database: Database,
}

/// A request whose answer is not recorded.
const OPEN_REQUEST: Uuid = Uuid::from_u128(8);
const BASELINE_ORGANIZATION: &str = "before";

impl Books {
    fn on(database: Database) -> Books {
        let settings = LedgerSettings { url: database.url.clone(), connections: 8 };
        let ledger = Ledger::open(&settings, Clock::manual(noon())).unwrap();
        Books { ledger, database }
    }

    async fn empty() -> Books {
        Books::on(migrated().await)
    }

    /// A ledger with batches of every kind.
    async fn filled() -> Books {
        let books = Books::empty().await;
        let source_id = books.register().await;
        for topic in Topic::ALL {
            books.record(partition(topic, 0), 0).await;
            books.record(partition(topic, 0), 8).await;
        }
        publish(&books.ledger, source_id, "usage-1").await;
        send_as(&books.ledger, source_id, "usage-4", OPEN_REQUEST).await;
        books.settle(source_id, "usage-2").await;
        books.add_license(source_id).await;
        books.discard().await;
        books.correct(source_id).await;
        books.lose(source_id, "usage-9").await;
        books
    }

    async fn register(&self) -> i16 {
        let baseline = Baseline {
            until: noon(),
            creations: vec![BaselineRow {
                organization_name: BASELINE_ORGANIZATION.into(),
                template_name: "t".into(),
                preset_name: String::new(),
                creations: 7,
            }],
            started: vec![Uuid::from_u128(1)],
        };
        let now = noon();
        let mut ids = Vec::new();
        for (deployment, baseline) in [(DEPLOYMENT, Some(&baseline)), (OTHER_DEPLOYMENT, None)] {
            let register = self
                .ledger
                .run(async |conn| sources::register(conn, deployment, now, baseline, now).await);
            ids.push(register.await.unwrap().id);
        }
        ids[0]
    }

    /// Records a batch of 6 events, a reject and a held record.
    async fn record(&self, at: TopicPartition, first: u32) {
        let lease = lease_partition(&self.ledger, at, 0).await.unwrap();
        let number = |n: u32| n + 100 * u32::try_from(at.partition).unwrap();
        let mut arrivals: Vec<Arrival> =
            (first..first + 6).map(|n| arrival(n.into(), event(at.topic, number(n)))).collect();
        arrivals.push(refused(i64::from(first) + 6, Disposition::Rejected));
        arrivals.push(refused(i64::from(first) + 7, Disposition::Held));
        let next = i64::from(first) + 8;
        record_batch(&self.ledger, &Chain::Live(lease), &arrivals, next).await.unwrap();
    }

    async fn settle(&self, source_id: i16, event_id: &str) {
        let (ids, now) = ([event_id.to_owned()], noon());
        let settle = self.ledger.run(async |conn| {
            publications::settle(conn, source_id, "me", &ids, Settlement::NotOurs, now).await
        });
        assert_eq!(settle.await.unwrap().not_ours, 1);
    }

    async fn add_license(&self, source_id: i16) {
        let lease = take_lease(&self.ledger, "collector", "me", Duration::from_secs(60));
        let lease = lease.await.unwrap().expect("free");
        let change = LicenseChange {
            license_id: 3,
            jwt_sha256: [3; 32],
            uploaded_at: Some(noon()),
            state: LicenseState::Refused("expired".into()),
        };
        let record = self
            .ledger
            .run(async |conn| licenses::record(conn, &lease, source_id, &[change], noon()).await);
        record.await.unwrap();
    }

    async fn discard(&self) {
        let query = "select id from reject order by id limit 1";
        let id: i64 = sqlx::query_scalar(query).fetch_one(&self.ledger.pool).await.unwrap();
        let act = NewAct {
            actor: "sre-1",
            act: ActKind::Discard,
            subject: Subject::Reject(id),
            reason: "a reason",
            detail: serde_json::json!({ "a": 1 }),
        };
        let discard =
            self.ledger.run(async |conn| rejects::discard(conn, &[id], &[act], noon()).await);
        assert!(discard.await.unwrap().is_some());
    }

    /// Corrects a usage event to another instant, and a build to nothing.
    async fn correct(&self, source_id: i16) {
        let (usage, build) = (event(Topic::AgentUsage, 3), event(Topic::WorkspaceBuilds, 4));
        let later = {
            let mut later = usage.clone();
            if let Payload::Usage(usage) = &mut later.payload {
                usage.created_at += TimeDelta::seconds(1);
            }
            later
        };
        let build_id = build_of(&build.id());
        let publication =
            Some(PublicationNow { state: PublicationState::Pending, unanswered: false });
        let ids = [usage.id()];
        let release =
            self.ledger.run(async |conn| publications::release(conn, source_id, "me", &ids).await);
        release.await.unwrap();
        let mut corrections = Vec::new();
        for (before, after, build_id, publication) in
            [(usage, Some(later), None, publication), (build, None, build_id, None)]
        {
            let query = "select id from batch where topic = $1 and first_offset = 0";
            let accepted_batch_id = sqlx::query_scalar(query)
                .bind(before.topic())
                .fetch_one(&self.ledger.pool)
                .await
                .unwrap();
            corrections.push(NewCorrection {
                event_id: before.id(),
                topic: before.topic(),
                build_id,
                accepted_batch_id,
                before: Some(before),
                after,
                publication,
            });
        }
        let act = NewAct {
            actor: "sre-1",
            act: ActKind::Correct,
            subject: Subject::Named("a plan"),
            reason: "a reason",
            detail: serde_json::json!({ "a": 1 }),
        };
        let record = self.ledger.run(async |conn| {
            corrections::record(conn, source_id, &corrections, &act, noon()).await
        });
        let recorded = record.await.unwrap();
        assert!(matches!(recorded, Correction::Done(_)), "{recorded:?}");
    }

    /// Records that coderd has lost an event.
    async fn lose(&self, source_id: i16, event_id: &str) {
        self.tamper("insert into plan (hash, kind, request, effect, planned_at) values ('lost', 'recover', '{}', '{}', now())").await;
        let act = NewAct {
            actor: "sre-1",
            act: ActKind::Recover,
            subject: Subject::Named("lost"),
            reason: "a reason",
            detail: serde_json::json!({}),
        };
        let (ids, now) = ([event_id.to_owned()], noon());
        let record = self
            .ledger
            .run(async |conn| losses::record(conn, source_id, &ids, &act, "lost", now).await);
        assert!(record.await.unwrap());
    }

    /// Reads the contradictions between rows.
    async fn contradictions(&self) -> Vec<Difference> {
        let mut reading = RowReading::default();
        let mut found = Vec::new();
        while let Some(page) = self.ledger.run(async |conn| reading.read(conn).await).await.unwrap()
        {
            found.extend(page);
        }
        found
    }

    async fn close(&self) {
        self.ledger.pool.close().await;
        self.database.pool.close().await;
    }

    /// The same ledger in a database of its own, with a statement executed.
    async fn changed(&self, statement: &'static str) -> Books {
        let server = support::setting("TALLYLINE_TEST_POSTGRES");
        let books = Books::on(support::database_like(&server, &self.database.name).await);
        books.tamper(statement).await;
        books
    }

    async fn tamper(&self, statement: &'static str) {
        sqlx::raw_sql(statement)
            .execute(&self.ledger.pool)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error}"));
    }

    async fn head(&self) -> Head {
        self.ledger.run(head::read).await.unwrap()
    }

    async fn chained(&self, earlier: Option<Head>) -> Joint {
        let audit = Audit {
            ledger: self.ledger.clone(),
            log: Log::postgres(self.database.pool.clone(), PostgresLogSettings::default()),
            source: None,
            patience: Duration::ZERO,
        };
        let done = std::cell::Cell::new(0);
        let until = audit.head().await.unwrap();
        let joint = audit.chained(until, earlier, |more| done.set(done.get() + more)).await;
        let joint = joint.unwrap();
        assert_eq!(i64::try_from(done.get()).unwrap(), joint.numbers["batches_in_the_chain"]);
        joint
    }

    /// Recomputes everything that a process would have written.
    async fn recompute_the_chain(&self) {
        let until = self.head().await.sequence.number;
        let page = self
            .ledger
            .run(async |conn| chain::page(conn, (0, i64::MAX), until).await)
            .await
            .unwrap();
        for batch in page {
            let rows: Vec<_> =
                batch.events.iter().map(|(_, event)| event.part_row().unwrap()).collect();
            let part = BatchPart::of(rows.iter());
            sqlx::query(
                "update batch_part set rows = $2, sha256 = $3, marks = $4 where batch_id = $1 and part = 'events'",
            )
            .bind(batch.id)
            .bind(part.rows)
            .bind(part.sha256)
            .bind(part.marks)
            .execute(&self.ledger.pool)
            .await
            .unwrap();
        }
        self.tamper(
            r#"
            delete from batch_part where part <> 'events';
            insert into batch_part (batch_id, part, rows, sha256, marks)
                select batch_id, part, count(*), sha256(string_agg(digest, '' order by name collate "C", digest)),
                    string_agg(place || substr(digest, 1, 4), '' order by name collate "C", digest)
                from chained_row group by batch_id, part;
            do $$
            declare
                one record;
                before bytea := decode(repeat('00', 32), 'hex');
            begin
                for one in select id, content from batch_content order by sequence loop
                    before := sha256(before || one.content);
                    update batch set chain = before where id = one.id;
                end loop;
                update ledger set chain = before;
            end $$
            "#,
        )
        .await;
    }
}

fn differences(joint: &Joint) -> Vec<(&str, &str, &str)> {
    let rows = joint.differences.iter();
    rows.map(|row| (&*row.kind, row.id.as_str(), row.detail.as_str())).collect()
}

/// A change of the ledger, the kind of difference, the start of its id, and words of its detail.
type Row = (&'static str, &'static str, String, &'static str);

fn event_rows() -> Vec<Row> {
    let id = |topic, n| event(topic, n).id();
    let build = |n| id(Topic::WorkspaceBuilds, n);
    let (claim, usage) = (id(Topic::PrebuildClaims, 1), id(Topic::AgentUsage, 1));
    let any = |text: &str| text.to_owned();
    vec![
        ("update workspace_build set owner_name = 'x' where log_offset = 9", "row_changed", build(9), "accepted event: it differs from"),
        ("update workspace_build set first_build_stage = 'claim' where log_offset = 1", "row_changed", build(1), "batch"),
        ("update workspace_build set has_ai_task = false where log_offset = 1", "row_changed", build(1), "batch"),
        ("update workspace_build set digest = decode(repeat('00', 32), 'hex') where log_offset = 2", "row_changed", build(2), "batch"),
        // characters that move from one field to the next
        (
            "update workspace_build set owner_name = 'p' || owner_name, workspace_name = 'worksspace' where log_offset = 1",
            "row_changed",
            build(1),
            "batch",
        ),
        ("update prebuild_claim set claimed_by = gen_random_uuid() where log_offset = 1", "row_changed", claim, "batch"),
        ("update usage_event set published_at = created_at where log_offset = 1", "row_changed", usage.clone(), "batch"),
        ("update usage_event set failure_message = '' where log_offset = 1", "row_changed", usage, "batch"),
        ("delete from workspace_build where log_offset = 9", "row_removed", any("tallyline.workspace-builds.v1/0@9"), "it was removed from"),
        ("delete from prebuild_claim where log_offset = 1", "row_removed", any("tallyline.prebuild-claims.v1/0@1"), "it was removed from"),
        ("delete from usage_event where log_offset = 1", "row_removed", any("tallyline.agent-usage.v1/0@1"), "it was removed from"),
        (
            "create temporary table forged as select * from workspace_build where log_offset = 2;
             update forged set build_id = 'ffffffff-0000-0000-0000-000000000000', log_offset = 6;
             insert into workspace_build select * from forged",
            "row_added",
            any("workspace_build_completed:ffffffff-"),
            "was added later to",
        ),
        (
            "create temporary table forged as select * from prebuild_claim where log_offset = 2;
             update forged set build_id = 'ffffffff-0000-0000-0000-000000000000', log_offset = 6;
             insert into prebuild_claim select * from forged",
            "row_added",
            any("prebuild_claimed:ffffffff-"),
            "was added later to",
        ),
        (
            "create temporary table forged as select * from usage_event where log_offset = 2;
             update forged set id = 'forged', log_offset = 6;
             insert into usage_event select * from forged",
            "row_added",
            any("forged"),
            "was added later to",
        ),
        // a batch that had no events
        (
            "create temporary table forged as select * from usage_event where log_offset = 2;
             update forged set id = 'forged', batch_id = (select id from batch where kind = 'licenses');
             insert into usage_event select * from forged",
            "row_added",
            any("forged"),
            "was added later to",
        ),
    ]
}

fn other_rows() -> Vec<Row> {
    let any = |text: &str| text.to_owned();
    vec![
        // a verdict that was rewritten with all that follows from it
        (
            "update publication_attempt set verdict = 'refused', message = 'no';
             update settlement set state = 'refused' where state = 'published';
             update publication set state = 'refused', last_message = 'no' where state = 'published'",
            "row_changed",
            any("usage-1"),
            "request to the vendor, or its verdict: it differs from",
        ),
        ("update publication_attempt set message = ''", "row_changed", any("usage-1"), "verdict"),
        ("delete from publication_attempt", "row_removed", any("attempts of batch "), "verdict"),
        ("update publication_request set status = 500", "row_changed", any("request "), "verdict"),
        ("update publication_request set batch_id = null", "row_removed", any("attempts of batch "), "verdict"),
        // a request without an answer
        (
            "alter table publication_attempt disable trigger all; alter table publication_request disable trigger all;
             delete from publication_attempt where event_id = 'usage-4'; delete from publication_request where open_batch_id is not null;
             update publication set attempts = 0, unanswered = false where event_id = 'usage-4'",
            "row_removed",
            any("requests of batch "),
            "request",
        ),
        ("update publication_request set open_batch_id = null, event_ids_sha256 = null", "row_removed", any("requests of batch "), "request"),
        // events that coderd has lost
        (
            "insert into source_lost select source_id, 'usage-6', batch_id, act_id from source_lost",
            "row_added",
            any("lost event usage-6 of source "),
            "fact",
        ),
        ("update source_lost set event_id = 'usage-6'", "row_added", any("lost event usage-6 of source "), "fact"),
        ("update settlement set state = 'expired' where state = 'not_ours'", "row_changed", any("usage-2"), "settlement"),
        ("delete from settlement where state = 'not_ours'", "row_removed", any("settlements of batch "), "settlement"),
        (
            "insert into settlement (source_id, event_id, batch_id, state) select 1, 'usage-0', id, 'not_ours' from batch where settled = 1",
            "row_added",
            any("usage-0"),
            "settlement",
        ),
        ("update reject set payload = 'other' where log_offset = 6", "row_changed", any("reject "), "reject: it differs from"),
        ("update reject set payload = null where log_offset = 6", "row_changed", any("reject "), "reject"),
        ("update reject set detail = '' where log_offset = 6", "row_changed", any("reject "), "reject"),
        (
            "delete from reject where log_offset = 14 and topic like '%usage%'",
            "row_removed",
            any("tallyline.agent-usage.v1/0@14"),
            "reject: it was removed from",
        ),
        (
            "create temporary table forged as select * from reject where log_offset = 6 limit 1;
             update forged set id = 999, log_offset = 7000;
             insert into reject overriding system value select * from forged",
            "row_added",
            any("reject 999"),
            "was added later to",
        ),
        ("update operator_act set reason = 'another'", "row_changed", any("act "), "fact"),
        ("update operator_act set actor = actor || substr(reason, 1, 1), reason = substr(reason, 2)", "row_changed", any("act "), "fact"),
        ("update operator_act set detail = '{}'", "row_changed", any("act "), "fact"),
        ("update correction set before_event = '{}' where build_id is null", "row_changed", any("correction of usage-3 of source "), "fact"),
        ("update correction set quantity = quantity + 1 where build_id is null", "row_changed", any("correction of usage-3 of source "), "fact"),
        ("update correction set accepted_batch_id = 0", "row_changed", any("correction of workspace_build_completed:"), "fact"),
        ("delete from correction where build_id is null", "row_removed", any("facts of batch "), "fact"),
        ("update first_start_change set previous_build_id = null", "row_changed", any("first start of workspace "), "fact"),
        ("update license set refusal = null, claims = '{}'", "row_changed", any("license 3 of source"), "fact"),
        ("delete from license", "row_removed", any("facts of batch "), "fact"),
        ("update source set baseline_until = null", "row_changed", format!("source {DEPLOYMENT}"), "fact"),
        ("update creation_baseline set creations = 8", "row_changed", any("baseline of before/t/"), "fact"),
        (
            "update workspace_first_start set build_id = null
             where build_id = (select build_id from workspace_build where log_offset = 1)",
            "row_added",
            any("workspace "),
            "fact",
        ),
        // the batches themselves
        ("update batch set recorded_at = recorded_at + interval '1 microsecond' where sequence = 3", "batch_off_chain", any("batch "), "sequence 3"),
        ("update batch set accepted = accepted - 1, duplicates = duplicates + 1 where sequence = 3", "batch_off_chain", any("batch "), "sequence 3"),
        ("update batch set epoch = 99 where sequence = 3", "batch_off_chain", any("batch "), "sequence 3"),
        ("update batch set chain = null where sequence = 3", "batch_off_chain", any("batch "), "sequence 3"),
        ("update batch_part set sha256 = sha256('x') where part = 'rejects'", "batch_off_chain", any("batch "), "sequence 3"),
        ("delete from batch_part where part = 'events'", "batch_part_changed", any("batch "), "digest of its events is missing"),
        ("delete from batch where sequence = 3", "batch_missing", any("sequence 3"), "no batch has the sequences 3 to 3"),
        (
            "alter table batch disable trigger all;
             insert into batch (kind, recorded_at) values ('operator', now())",
            "batch_outside_the_chain",
            any("batch "),
            "added or changed by hand",
        ),
        (
            "alter table batch disable trigger all; alter table batch drop constraint batch_sequence_is_positive;
             insert into batch (kind, sequence, recorded_at, settled) values ('verdicts', -1, now(), 0)",
            "batch_outside_the_chain",
            any("batch "),
            "sequence -1 is outside",
        ),
        (
            "alter table batch disable trigger all; alter table batch drop constraint batch_sequence_is_unique;
             insert into batch (kind, sequence, recorded_at, settled) values ('verdicts', 3, now(), 0)",
            "batch_outside_the_chain",
            any("batch "),
            "sequence 3 is outside",
        ),
        ("update ledger set chain = sha256('x')", "head_off_chain", any(""), "newest batch"),
        ("update ledger set next_sequence = next_sequence + 2", "batch_missing", any("sequence "), "no batch has"),
    ]
}

async fn each_is_named(rows: Vec<Row>) {
    let books = Books::filled().await;
    let joint = books.chained(Some(books.head().await)).await;
    assert_eq!(differences(&joint), []);
    books.close().await;
    let mut missed = Vec::new();
    for (statement, kind, id, words) in rows {
        let books = books.changed(statement).await;
        let joint = books.chained(None).await;
        let named = differences(&joint)
            .iter()
            .any(|row| row.0 == kind && row.1.starts_with(&id) && row.2.contains(words));
        if !named {
            missed.push(format!("{statement}: expected {kind} {id} {words:?}, found {joint:#?}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[tokio::test]
async fn a_changed_removed_or_added_event_is_named_without_the_log() {
    each_is_named(event_rows()).await;
}

#[tokio::test]
async fn a_change_of_any_other_row_of_a_batch_is_named() {
    each_is_named(other_rows()).await;
}

#[tokio::test]
async fn only_the_batch_and_the_row_that_were_changed_are_named() {
    let books = Books::filled().await;
    books.tamper("update workspace_build set owner_name = 'x' where log_offset = 9").await;
    books.tamper("update batch set epoch = 99 where sequence = 3").await;
    let joint = books.chained(None).await;
    let found: Vec<_> = differences(&joint).into_iter().map(|(kind, ..)| kind).collect();
    assert_eq!(found, ["batch_off_chain", "row_changed"], "{joint:#?}");
}

#[tokio::test]
async fn a_chain_that_was_recomputed_is_found_by_an_earlier_head_only() {
    let books = Books::filled().await;
    let (earlier, early) =
        (books.head().await, books.ledger.run(async |conn| head::at(conn, 2).await).await.unwrap());
    books
        .tamper(
            "update workspace_build set owner_name = 'x' where log_offset = 9;
             update reject set detail = 'x' where log_offset = 6; update operator_act set reason = 'x'",
        )
        .await;
    assert!(!books.chained(None).await.differences.is_empty());
    books.recompute_the_chain().await;
    assert_eq!(differences(&books.chained(None).await), []);
    let joint = books.chained(Some(earlier)).await;
    assert_eq!(differences(&joint).len(), 1);
    let (kind, id, _) = differences(&joint)[0];
    assert_eq!((kind, id), ("head_differs", earlier.sequence.to_string().as_str()));
    // the first batches were not changed
    let joint = books.chained(early).await;
    assert_eq!((differences(&joint), joint.numbers["batches_up_to_the_given_head"]), (vec![], 2));
}

#[tokio::test]
async fn a_removed_tail_is_found_by_an_earlier_head_only() {
    let books = Books::filled().await;
    let earlier = books.head().await;
    books
        .tamper(
            "alter table operator_act disable trigger all; alter table batch disable trigger all;
             update reject set state = 'open', act_id = null; delete from operator_act; delete from correction; delete from first_start_change;
             with gone as (delete from batch where kind = 'operator' returning sequence)
             update ledger set next_sequence = (select min(sequence) from gone),
                 chain = (select chain from batch where sequence = (select min(sequence) - 1 from gone))",
        )
        .await;
    assert_eq!(differences(&books.chained(None).await), []);
    let joint = books.chained(Some(earlier)).await;
    let (kind, id, detail) = differences(&joint)[0];
    assert_eq!((kind, id), ("head_beyond_the_ledger", earlier.sequence.to_string().as_str()));
    assert!(detail.contains(&books.head().await.sequence.to_string()), "{detail}");
}

#[tokio::test]
async fn heads_of_an_earlier_incarnation_accuse_no_restored_ledger() {
    let books = Books::filled().await;
    let backed_up = books.head().await;
    books.close().await;
    // the original goes on, and its backup is restored and goes on otherwise
    let original = books.changed("select").await;
    original.record(partition(Topic::AgentUsage, 1), 0).await;
    let lost = original.head().await;
    let other = books.changed("update ledger set incarnation = gen_random_uuid()").await;
    let joint = other.chained(Some(lost)).await;
    assert_eq!(differences(&joint)[0].0, "head_of_another_ledger");
    other.tamper("insert into past_incarnation select gen_random_uuid()").await;
    let past = format!("insert into past_incarnation values ('{}')", lost.sequence.incarnation);
    sqlx::raw_sql(sqlx::AssertSqlSafe(past)).execute(&other.ledger.pool).await.unwrap();
    assert_eq!(differences(&other.chained(Some(lost)).await)[0].0, "head_of_another_ledger");

    let again = books.changed("select").await;
    let evidence = RestoreEvidence::Batch(newest_landmark(&original.ledger).await);
    let detected =
        again.ledger.run(async |conn| restored::record_detected(conn, &evidence, noon()).await);
    assert!(detected.await.unwrap());
    again.record(partition(Topic::AgentUsage, 1), 8).await;
    let joint = again.chained(Some(backed_up)).await;
    let (open, fits) = (&joint.open, joint.numbers["batches_up_to_the_given_head"]);
    assert_eq!((differences(&joint), open.len(), fits), (vec![], 0, backed_up.sequence.number));
    let joint = again.chained(Some(lost)).await;
    assert_eq!((differences(&joint), joint.open.len()), (vec![], 1));
    assert_eq!(joint.open[0].kind, "head_of_an_earlier_incarnation");

    // the chain is recomputed after the restore: a head from before it must still match
    let current = again.head().await;
    again.tamper("update workspace_build set owner_name = 'x' where log_offset = 9").await;
    again.recompute_the_chain().await;
    let joint = again.chained(Some(backed_up)).await;
    assert_eq!((differences(&joint)[0].0, joint.open.len()), ("head_differs", 0));
    again.tamper("update ledger set incarnation = gen_random_uuid()").await;
    let joint = again.chained(Some(current)).await;
    let found: Vec<_> = differences(&joint).into_iter().map(|(kind, ..)| kind).collect();
    assert_eq!((found, joint.open.len()), (vec!["incarnation_off_its_act", "head_differs"], 0));
}
