//! Retention: what is past its days goes, is counted, and is still verified. Nothing open or
//! unsettled goes.

mod attempts;
mod plans;
mod rejects;
mod rounds;
mod tampering;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::TimeDelta;
use tallyline::audit::{Audit, AuditReport};
use tallyline::clock::Clock;
use tallyline::consumer;
use tallyline::event::{Message, Topic, TopicPartition};
use tallyline::ledger::{
    Attempt, AttemptVerdict, Chain, Ledger, LedgerSettings, NewRequest, PruneKind, RequestOutcome,
    Retention, Settlement, prune, publication_requests, publications,
};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::{Actor, DiscardRejects, ListRejects, Operations, Pruner, WhichRejects};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::Database;
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, act, ask, lease_partition, migrated, noon, operations,
    record_batch, register, usage,
};

const RETENTION: Retention = Retention { reject_payload_days: 180, attempt_days: 400 };

/// A ledger with a log in its database, and a clock that the test sets.
struct World {
    operations: Operations,
    database: Database,
}

fn operator() -> Actor {
    Actor { name: "operator-1".to_owned(), reason: "the disk is full".to_owned() }
}

impl World {
    async fn new() -> World {
        let database = migrated().await;
        let settings = LedgerSettings { url: database.url.clone(), connections: 4 };
        let ledger = Ledger::open(&settings, Clock::manual(noon())).unwrap();
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.unwrap();
        register(&ledger, &[DEPLOYMENT, OTHER_DEPLOYMENT]).await;
        let operations = Operations { retention: RETENTION, ..operations(&ledger, &log) };
        World { operations, database }
    }

    fn ledger(&self) -> &Ledger {
        &self.operations.ledger
    }

    /// Sets the clock to this long after noon.
    fn at(&self, after: TimeDelta) {
        self.ledger().clock.set(noon() + after);
    }

    async fn append(&self, messages: Vec<Message>) {
        self.operations.log.append(Topic::AgentUsage, messages).await.unwrap();
    }

    /// Records everything in the log, as a consumer does.
    async fn consume(&self) {
        let partition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
        loop {
            let claim = lease_partition(self.ledger(), partition, 0).await.unwrap();
            let records =
                self.operations.log.read(partition, claim.next_offset, 5_000).await.unwrap();
            let Some(last) = records.last() else { return };
            let next_offset = last.offset + 1;
            let arrivals: Vec<_> = records
                .into_iter()
                .map(|record| consumer::read_from(Topic::AgentUsage, record))
                .collect();
            let chain = Chain::Live(claim);
            record_batch(self.ledger(), &chain, &arrivals, next_offset).await.unwrap();
        }
    }

    /// Records these messages and returns the ids of the rejects in order.
    async fn take(&self, messages: Vec<Message>) -> Vec<i64> {
        self.append(messages).await;
        self.consume().await;
        let which = WhichRejects { state: "all".to_owned(), ..WhichRejects::default() };
        let page = ask(&self.operations, &ListRejects { which, after: 0, limit: 1_000 }).await;
        page.unwrap().rejects.iter().map(|reject| reject.id).collect()
    }

    async fn discard(&self, ids: &[i64]) {
        for ids in ids.chunks(200) {
            let discard = DiscardRejects { ids: ids.to_vec() };
            act(&self.operations, &discard, &operator()).await.unwrap();
        }
    }

    async fn usage(&self, numbers: std::ops::Range<u32>) {
        self.take(numbers.map(|n| usage(DEPLOYMENT, n).to_message()).collect()).await;
    }

    async fn source_id(&self) -> i16 {
        sqlx::query_scalar("select id from source where deployment_id = $1")
            .bind(DEPLOYMENT)
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
    }

    /// Writes a request with these events, as before it is sent.
    async fn send(&self, request: u128, event_ids: &[&str]) {
        let (source_id, lease) = (self.source_id().await, Duration::from_secs(60));
        let now = self.ledger().clock.now();
        let sql = "update publication set leased_by = 'me', leased_until = now() + interval '1 hour' where event_id = any($1)";
        sqlx::query(sql).bind(event_ids).execute(&self.database.pool).await.unwrap();
        let request = NewRequest {
            id: Uuid::from_u128(request),
            source_id,
            license_sha256: [1; 32],
            event_ids: event_ids.to_vec(),
            holder: "me",
            lease,
        };
        let begin =
            self.ledger().run(async |conn| publication_requests::begin(conn, &request, now).await);
        assert!(begin.await.unwrap());
    }

    /// Sends a request, and records these verdicts.
    async fn request(
        &self,
        request: u128,
        verdicts: &[(&str, AttemptVerdict)],
        error: Option<&str>,
    ) {
        let ids: Vec<&str> = verdicts.iter().map(|(id, _)| *id).collect();
        self.send(request, &ids).await;
        let now = self.ledger().clock.now();
        let attempts = verdicts.iter().map(|(id, verdict)| Attempt {
            event_id: (*id).to_owned(),
            verdict: *verdict,
            message: Some(format!("message of {id}")),
            next_attempt_at: now,
            unanswered: false,
            held_for: None,
        });
        let outcome = RequestOutcome {
            id: Uuid::from_u128(request),
            source_id: self.source_id().await,
            holder: "me",
            answered_at: Some(now),
            status: Some(200),
            error: error.map(str::to_owned),
            attempts: attempts.collect(),
            lease: None,
        };
        self.ledger()
            .run(async |conn| publication_requests::record_outcome(conn, &outcome, now).await)
            .await
            .unwrap();
    }

    async fn settle(&self, event_id: &str, settlement: Settlement) {
        let (source_id, ids) = (self.source_id().await, [event_id.to_owned()]);
        let now = self.ledger().clock.now();
        let sql =
            "update publication set leased_by = null, leased_until = null where event_id = $1";
        sqlx::query(sql).bind(event_id).execute(&self.database.pool).await.unwrap();
        self.ledger()
            .run(async |conn| {
                publications::settle(conn, source_id, "me", &ids, settlement, now).await
            })
            .await
            .unwrap();
    }

    /// One round of another process, whose last round is long over. Returns the rows by kind.
    async fn round(&self) -> BTreeMap<PruneKind, i64> {
        let forget = "update prune_kind set ran_at = null";
        sqlx::query(forget).execute(&self.database.pool).await.unwrap();
        let mut removed = BTreeMap::new();
        let mut pruner = Pruner::new(self.ledger().clone(), RETENTION);
        let mut each = |kind, more: tallyline::ledger::Removed| {
            *removed.entry(kind).or_default() += more.rows;
        };
        assert!(pruner.round(&CancellationToken::new(), &mut each).await.unwrap());
        removed.retain(|_, rows| *rows > 0);
        removed
    }

    /// All audits: the books, the log record by record, and the chain.
    async fn audit(&self) -> AuditReport {
        let audit = Audit {
            ledger: self.ledger().clone(),
            log: self.operations.log.clone(),
            source: None,
            patience: Duration::ZERO,
        };
        let ranges = audit.rereadable().await.unwrap();
        let deep = audit.deep(&ranges, |_| {}).await.unwrap();
        let chained = audit.chained(audit.head().await.unwrap(), None, |_| {}).await.unwrap();
        audit.run().await.unwrap().with(deep).with(chained)
    }

    /// Kind and id of each difference.
    async fn differences(&self) -> Vec<(String, String)> {
        let report = self.audit().await;
        let rows = report.joints.into_iter().flat_map(|joint| joint.differences);
        rows.map(|row| (row.kind.into_owned(), row.id)).collect()
    }

    async fn tamper(&self, sql: &'static str) {
        let done = sqlx::query(sql).execute(&self.database.pool).await.unwrap();
        assert!(done.rows_affected() > 0, "{sql}");
    }

    async fn number(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.database.pool).await.unwrap()
    }

    /// Rows that were removed since the newest act `prune`.
    async fn uncounted(&self) -> i64 {
        let states = self.ledger().run(prune::states).await.unwrap();
        states.iter().map(|state| state.rows).sum()
    }
}

fn days(days: i64) -> TimeDelta {
    TimeDelta::days(days)
}

/// A record that is not a valid event.
fn broken(n: u32) -> Message {
    Message {
        payload: Some(format!("no event {n}").into_bytes()),
        ..usage(DEPLOYMENT, n).to_message()
    }
}
