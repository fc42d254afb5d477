//! Processes report that they live, and their state.

use serde_json::Value;

use super::{Kind, Running, SOON, Site, append_builds, eventually_some};
use crate::support::eventually;

impl Running {
    /// The process's own report of its state, newly written.
    pub(super) async fn state(&self, site: &Site) -> Value {
        let pid = i64::from(self.process.pid());
        sqlx::query("update process set standing = '{}'").execute(&site.ledger.pool).await.unwrap();
        eventually_some(SOON, "the process reports its state", async || {
            let status = site.status().await;
            let process = status["processes"]
                .as_array()?
                .iter()
                .find(|process| process["pid"] == pid)?
                .clone();
            (process["standing"] != serde_json::json!({})).then(|| process["standing"].clone())
        })
        .await
    }
}

#[tokio::test]
async fn a_process_is_shown_while_it_runs_and_after_a_kill_and_not_after_a_clean_end() {
    let site = Site::registered(Kind::Postgres).await;
    append_builds(&site.log(), 0..50).await;
    let (mut clean, mut killed) = (site.start(""), site.start("--role consume"));
    site.builds(50).await;
    eventually(SOON, "both are shown", || async {
        site.count("select count(*) from process").await == 2
    })
    .await;
    let state = clean.state(&site).await;
    assert!(
        state["serve"]["api"].is_string() && state["consume"]["partitions"].is_object(),
        "{state}"
    );
    let roles: Vec<String> =
        sqlx::query_scalar("select array_to_string(roles, ',') from process order by 1")
            .fetch_all(&site.ledger.pool)
            .await
            .unwrap();
    assert_eq!(roles, ["consume", "consume,serve"]);

    killed.process.kill();
    // half a minute later
    let aged =
        "update process set seen_at = seen_at - interval '31 seconds' where roles = '{consume}'";
    sqlx::query(aged).execute(&site.ledger.pool).await.unwrap();
    let status = site.status().await;
    let gone = |status: &Value| -> Vec<bool> {
        status["processes"].as_array().unwrap().iter().map(|row| row["gone"] == true).collect()
    };
    let mut states = gone(&status);
    states.sort_unstable();
    assert_eq!(states, [false, true], "{status}");
    assert!(site.command("status").await.stdout.contains("gone"));
    // a day later a living process removes it
    sqlx::query(
        "update process set seen_at = seen_at - interval '1 day' where roles = '{consume}'",
    )
    .execute(&site.ledger.pool)
    .await
    .unwrap();
    eventually(SOON, "it is not shown any more", || async {
        site.count("select count(*) from process").await == 1
    })
    .await;

    clean.ends_in_order().await;
    assert_eq!(site.count("select count(*) from process").await, 0);
}

#[tokio::test]
async fn a_process_without_the_role_serve_shows_its_telemetry_at_the_configured_address() {
    let mut site = Site::registered(Kind::Postgres).await;
    site.set("telemetry.listen", "'127.0.0.1:0'");
    append_builds(&site.log(), 0..50).await;
    let mut running = site.start("--role consume");
    site.builds(50).await;
    let line = running.says(&["\"message\":\"listening\"", "\"telemetry\":"]).await;
    let line: Value = serde_json::from_str(&line).unwrap();
    let at = format!("http://{}", line["telemetry"].as_str().unwrap());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = async |path: &str| {
        let answer = client.get(format!("{at}{path}")).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let (_, metrics) = get("/metrics").await;
    assert!(
        metrics.contains("tallyline_consumer_records_total{disposition=\"accepted\"} 50\n"),
        "{metrics}"
    );
    assert!(!metrics.contains("coderd_"), "no domain series: {metrics}");
    assert_eq!(get("/healthz").await.0, 200);
    let (code, readiness) = get("/readyz").await;
    let readiness: Value = serde_json::from_str(&readiness).unwrap();
    let checks: Vec<&str> =
        readiness["checks"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!((code, checks), (200, vec!["ledger", "log", "partitions", "pauses"]), "{readiness}");
    assert_eq!(get("/api/v1/status").await.0, 404);
    for (host, code) in [("evil.example", 403), ("localhost", 200), ("10.1.2.3:2113", 200)] {
        let answer = client.get(format!("{at}/metrics")).header("host", host).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), code, "{host}");
    }
    running.ends_in_order().await;

    site.set("telemetry.listen", "'0.0.0.0:2113'");
    let refused = site.command("check").await;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        refused.stdout.contains("telemetry.listen") || refused.stderr.contains("telemetry.listen"),
        "{refused:?}"
    );
}
