//! The program removes rows past their retention by itself.

use super::{Kind, SOON, Site};
use crate::support::eventually;

#[tokio::test]
async fn a_deployment_without_the_role_serve_is_pruned() {
    let mut site = Site::new(Kind::Postgres).await;
    let _coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'publish']");
    let old = "insert into plan (hash, kind, request, effect, planned_at) values ('old', 'replay', '{}', '{}', '2000-01-01T00:00:00Z')";
    sqlx::query(old).execute(&site.ledger.pool).await.unwrap();
    let mut running = site.start("");
    eventually(SOON, "a round removes the old plan", || async {
        site.count("select count(*) from plan").await == 0
            && site.count("select count(*) from prune_kind where ran_at is not null").await == 4
    })
    .await;
    running.process.kill();
    let status = site.status().await;
    let retention = status["retention"].as_array().unwrap();
    let plans = retention.iter().find(|row| row["kind"] == "plans").unwrap();
    assert_eq!(plans["rows"], 1, "{status}");
    assert!(site.command("status").await.stdout.contains("RETENTION OF"));
    let planned = site.command("prune plan").await;
    assert!(planned.stdout.contains("nothing is due"), "{planned:?}");
}
