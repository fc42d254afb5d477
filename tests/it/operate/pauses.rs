//! `tallyline pause` and `resume`: they are durable, apply to all processes and lose nothing.

use tallyline::event::Topic;

use super::{Kind, SOON, Site, append_builds, messages};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, usage};

const BUILDS: u32 = 500;
const USAGE: u32 = 100;

impl Site {
    /// Runs a command that must succeed.
    pub(super) async fn done(&self, words: &str) -> String {
        let ended = self.command(words).await;
        assert!(ended.status.success(), "{words}: {ended:?}");
        ended.stdout
    }

    /// Runs a command that must be refused with this exit code. Returns its message.
    pub(super) async fn refused(&self, words: &str, code: i32) -> String {
        let ended = self.command(words).await;
        assert_eq!(ended.status.code(), Some(code), "{words}: {ended:?}");
        ended.stderr
    }
}

/// Checks that neither process moves the paused partitions.
async fn nothing_moves(site: &Site) {
    let moved =
        "select coalesce(sum(next_offset), 0)::bigint from position where topic like '%builds%'";
    let before = site.count(moved).await;
    append_builds(&site.log(), BUILDS..2 * BUILDS).await;
    let usage = messages((0..USAGE).map(|n| usage(DEPLOYMENT, n)));
    site.log().append(Topic::AgentUsage, usage).await.unwrap();
    // the other topics go on
    eventually(SOON, "usage is in the ledger", || async {
        site.count("select count(*) from usage_event").await == i64::from(USAGE)
    })
    .await;
    assert_eq!(site.count(moved).await, before);
}

#[tokio::test]
async fn a_paused_topic_is_not_read_across_restarts_and_resumes_without_loss() {
    for kind in [Kind::Postgres, Kind::Kafka] {
        let site = Site::registered(kind).await;
        let (mut one, mut other) = (site.start("--role consume"), site.start("--role consume"));
        append_builds(&site.log(), 0..BUILDS).await;
        site.builds(i64::from(BUILDS)).await;
        eventually(SOON, "both have partitions", || async {
            [&one, &other]
                .iter()
                .all(|process| process.process.stderr().contains("partitions assigned"))
        })
        .await;
        site.done("pause consume --topic tallyline.workspace-builds.v1 --as user-001 --reason maintenance").await;
        for process in [&one, &other] {
            process
                .says(&[
                    "consume of tallyline.workspace-builds.v1 is paused by user-001",
                    "maintenance",
                ])
                .await;
        }
        eventually(SOON, "records that were read are held", || async {
            [&one, &other]
                .iter()
                .any(|process| process.process.stderr().contains("partitions held"))
        })
        .await;
        // one dies, and the other gets its partitions; a new process comes and gets some: the pause
        // applies to all
        one.process.kill();
        let mut third = site.start("--role consume");
        third.says(&["partitions assigned"]).await;
        nothing_moves(&site).await;

        site.done("resume consume --topic tallyline.workspace-builds.v1 --as user-002").await;
        site.builds(i64::from(2 * BUILDS)).await;
        let numbers = site.balanced().await;
        for (name, expected) in
            [("accepted", 2 * BUILDS + USAGE), ("duplicates", 0), ("conflicts", 0), ("rejects", 0)]
        {
            assert_eq!(numbers[name], expected, "{name}: {numbers}");
        }
        let acts = "select count(*) from operator_act where subject = 'consume' and (act, actor) in (('pause', 'user-001'), ('resume', 'user-002'))";
        assert_eq!(site.count(acts).await, 2);
        other.ends_in_order().await;
        third.ends_in_order().await;
    }
}

#[tokio::test]
async fn a_forbidden_change_is_refused_with_actor_and_reason() {
    let site = Site::registered(Kind::Postgres).await;
    let message = site.refused("resume publish", 4).await;
    assert!(message.contains("publish is not paused"), "{message}");
    let message = site.refused("pause publish", 2).await;
    assert!(message.contains("reason"), "{message}");
    let message =
        site.refused("pause publish --topic tallyline.agent-usage.v1 --reason x", 2).await;
    assert!(message.contains("only consume goes by topics"), "{message}");
    let message = site.refused("pause consume --topic builds --reason x", 2).await;
    assert!(message.contains("tallyline.agent-usage.v1"), "{message}");

    site.done("pause consume --topic tallyline.agent-usage.v1 --as user-001 --reason inspection")
        .await;
    let message = site.refused("resume consume", 4).await;
    assert!(
        message.contains("consume is not paused")
            && message.contains("tallyline.agent-usage.v1 is paused by user-001"),
        "{message}"
    );
    // all may be paused beside one; then that one is paused twice
    site.done("pause consume --as user-002 --reason upgrade").await;
    let message =
        site.refused("pause consume --topic tallyline.prebuild-claims.v1 --reason x", 4).await;
    assert!(message.contains("paused by user-002") && message.contains("upgrade"), "{message}");
    let paused = site.status().await["pauses"].clone();
    assert_eq!(paused.as_array().map(Vec::len), Some(2), "{paused}");
    site.done("resume consume").await;
    site.done("resume consume --topic tallyline.agent-usage.v1").await;
    assert_eq!(site.status().await["pauses"], serde_json::json!([]));
}

#[tokio::test]
async fn paused_collecting_publishing_and_exporting_are_shown_everywhere() {
    let mut site = Site::new(Kind::Postgres).await;
    let _coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'publish', 'serve']");
    let mut running = site.start("");
    running.ready().await;
    eventually(SOON, "passes are recorded", || async {
        site.count("select coalesce(max(pass_id), 0) from collector_progress").await > 1
    })
    .await;
    for operation in ["collect", "publish", "export"] {
        site.done(&format!("pause {operation} --as user-001 --reason maintenance")).await;
    }
    eventually(SOON, "the collector has given its lease back", || async {
        site.count("select count(*) from lease where name like 'collector:%' and expires_at > clock_timestamp()").await == 0
    })
    .await;
    eventually(SOON, "the publisher says so", || async {
        let why = running.get("/readyz").await.1["checks"]["publisher"]["why"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        why.contains("publish is paused by user-001")
    })
    .await;
    let (passes, requests) = (
        "select pass_id from collector_progress",
        "select count(*) from publication where leased_until > clock_timestamp()",
    );
    let before = site.count(passes).await;

    let message = site.refused("export usage --from 2020-01-01 --to 2030-01-01 --file -", 4).await;
    assert!(
        message.contains("export is paused by user-001") && message.contains("maintenance"),
        "{message}"
    );
    let (code, readiness) = running.get("/readyz").await;
    assert_eq!(code, 200, "{readiness}");
    assert!(
        readiness["checks"]["pauses"]["why"]
            .as_str()
            .unwrap()
            .contains("collect is paused by user-001"),
        "{readiness}"
    );
    let metrics = running.metrics().await;
    for operation in ["collect", "publish", "export"] {
        assert!(
            metrics
                .contains(&format!("tallyline_paused{{operation=\"{operation}\",topic=\"\"}} 1\n")),
            "{metrics}"
        );
    }
    assert!(
        metrics.contains("tallyline_paused{operation=\"consume\",topic=\"\"} 0\n"),
        "{metrics}"
    );
    let status = site.status().await;
    assert_eq!(status["pauses"].as_array().map(Vec::len), Some(3), "{status}");
    let state = running.state(&site).await;
    assert!(
        state["collect"]["standing"].as_str().unwrap().contains("collect is paused"),
        "{state}"
    );
    assert_eq!((site.count(passes).await, site.count(requests).await), (before, 0));

    for operation in ["collect", "publish", "export"] {
        site.done(&format!("resume {operation}")).await;
    }
    eventually(SOON, "passes go on", || async { site.count(passes).await > before + 1 }).await;
    eventually(SOON, "the publisher works", || async {
        running.get("/readyz").await.1["checks"]["publisher"]["why"] == "working"
    })
    .await;
    site.done("export usage --from 2020-01-01 --to 2021-01-01 --file -").await;
    running.ends_in_order().await;
}
