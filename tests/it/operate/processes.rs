//! Processes tell that they live, and how they stand.

use serde_json::Value;

use super::{Kind, Running, SOON, Site, append_builds, found};
use crate::support::eventually;

impl Running {
    /// How this process stands, as it says itself: once it says it, and anew.
    pub(super) async fn standing(&self, site: &Site) -> Value {
        let pid = i64::from(self.process.pid());
        sqlx::query("update process set standing = '{}'").execute(&site.ledger.pool).await.unwrap();
        found(SOON, "the process tells how it stands", async || {
            let status = site.status().await;
            let process = status["processes"].as_array()?.iter().find(|process| process["pid"] == pid)?.clone();
            (process["standing"] != serde_json::json!({})).then(|| process["standing"].clone())
        })
        .await
    }
}

#[tokio::test]
async fn a_process_is_shown_while_it_lives_as_gone_once_it_was_killed_and_not_after_a_clean_end() {
    let site = Site::new(Kind::Postgres).await;
    append_builds(&site.log(), 0..50).await;
    let (mut clean, mut killed) = (site.start(""), site.start("--role consume"));
    site.builds(50).await;
    eventually(SOON, "both are shown", || async { site.count("select count(*) from process").await == 2 }).await;
    let standing = clean.standing(&site).await;
    assert!(standing["serve"]["api"].is_string() && standing["consume"]["partitions"].is_object(), "{standing}");
    let roles: Vec<String> =
        sqlx::query_scalar("select array_to_string(roles, ',') from process order by 1").fetch_all(&site.ledger.pool).await.unwrap();
    assert_eq!(roles, ["consume", "consume,serve"]);

    killed.process.kill();
    // half a minute later
    let aged = "update process set seen_at = seen_at - interval '31 seconds' where roles = '{consume}'";
    sqlx::query(aged).execute(&site.ledger.pool).await.unwrap();
    let status = site.status().await;
    let gone = |status: &Value| -> Vec<bool> { status["processes"].as_array().unwrap().iter().map(|row| row["gone"] == true).collect() };
    let mut told = gone(&status);
    told.sort_unstable();
    assert_eq!(told, [false, true], "{status}");
    assert!(site.command("status").await.stdout.contains("gone"));
    // a day later a living process forgets it
    sqlx::query("update process set seen_at = seen_at - interval '1 day' where roles = '{consume}'")
        .execute(&site.ledger.pool)
        .await
        .unwrap();
    eventually(SOON, "it is forgotten", || async { site.count("select count(*) from process").await == 1 }).await;

    clean.ends_in_order().await;
    assert_eq!(site.count("select count(*) from process").await, 0);
}
