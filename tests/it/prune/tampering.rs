//! A change of what retention left is found by the deep audit, with the row's name.

use tallyline::ledger::AttemptVerdict::{Accepted, Refused};

use super::{World, broken, days};

async fn pruned() -> World {
    let world = World::new().await;
    world.usage(1..4).await;
    let ids = world.take(vec![broken(7), broken(8)]).await;
    world.discard(&ids[..1]).await;
    world.request(1, &[("usage-1", Accepted), ("usage-2", Refused)], Some("odd")).await;
    world.request(2, &[("usage-3", Accepted)], None).await;
    world.at(days(401));
    let removed: i64 = world.round().await.values().sum();
    assert_eq!(removed, 4);
    assert_eq!(world.differences().await, []);
    world
}

/// Changes, and the kind and the beginning of the id of a difference that follows.
const CHANGES: [(&str, &str, &str); 11] = [
    ("update reject set payload_sha256 = sha256('x') where payload_removed_at is not null", "row_changed", "reject 1"),
    ("update reject set headers_sha256 = sha256('x') where payload_removed_at is not null", "row_changed", "reject 1"),
    ("update reject set payload_sha256 = sha256('x') where payload_removed_at is not null", "reject_changed", "reject 1"),
    (
        "update reject set state = 'discarded', act_id = (select act_id from reject where state <> 'open' limit 1),
             payload_removed_at = now(), payload = null, headers = null, headers_sha256 = sha256(headers),
             payload_sha256 = sha256(payload), unsigned_headers_sha256 = unsigned_headers(headers) where payload_removed_at is null",
        "removed_off_its_acts",
        "reject_payloads",
    ),
    (
        r#"update publication_request set verdicts = '{"accepted": 2}' where events = 2"#,
        "row_changed",
        "request 00000000-0000-0000-0000-000000000001",
    ),
    ("update publication_request set error_sha256 = null where events = 2", "row_changed", "request 00000000-0000-0000-0000-000000000001"),
    ("update publication_request set status = 500 where events = 2", "row_changed", "request 00000000-0000-0000-0000-000000000001"),
    ("update batch_part set sha256 = sha256('x') where part = 'attempts'", "batch_off_chain", "batch "),
    (
        "insert into publication_attempt (request_id, source_id, event_id, verdict)
         select id, source_id, 'usage-1', 'accepted' from publication_request where events = 2",
        "row_changed",
        "usage-1",
    ),
    ("update publication set removed_attempts = 0 where event_id = 'usage-1'", "publication_off_its_attempts", "usage-1"),
    (
        "update operator_act set detail = jsonb_set(detail, '{removed,attempts,rows}', '2') where act = 'prune'",
        "removed_off_its_acts",
        "attempts",
    ),
];

#[tokio::test]
async fn a_change_of_a_pruned_row_is_found() {
    let world = pruned().await;
    world.at(days(402) + chrono::TimeDelta::seconds(1));
    world.round().await;
    assert_eq!(world.uncounted().await, 0, "an act counts them");
    for (change, kind, id) in CHANGES {
        let saved = world.save().await;
        world.tamper(change).await;
        let found = world.differences().await;
        assert!(
            found.iter().any(|(found, named)| found == kind && named.starts_with(id)),
            "{change}: {found:?}"
        );
        world.restore(saved).await;
        assert_eq!(world.differences().await, [], "{change}: restored");
    }
}

/// The tables that the changes touch.
const TABLES: [&str; 6] = [
    "reject",
    "publication_attempt",
    "publication_request",
    "publication",
    "batch_part",
    "operator_act",
];

impl World {
    async fn save(&self) -> [&'static str; 6] {
        for table in TABLES {
            let sql = format!("create table saved_{table} as select * from {table}");
            sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&self.database.pool).await.unwrap();
        }
        TABLES
    }

    async fn restore(&self, tables: [&'static str; 6]) {
        let mut tx = self.database.pool.begin().await.unwrap();
        sqlx::query("set local session_replication_role = replica")
            .execute(&mut *tx)
            .await
            .unwrap();
        for table in tables {
            let identity = if matches!(table, "reject" | "operator_act") {
                "overriding system value"
            } else {
                ""
            };
            let sql = format!(
                "delete from {table}; insert into {table} {identity} select * from saved_{table}; drop table saved_{table}"
            );
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut *tx).await.unwrap();
        }
        tx.commit().await.unwrap();
    }
}
