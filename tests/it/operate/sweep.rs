//! `tallyline collect sweep`: an operator requests it, and the running collector does it.

use chrono::TimeDelta;
use serde_json::Value;
use tallyline_sim::coderd::SchemaVersion;

use super::{Kind, SOON, Site};
use crate::support::coderd::{Build, Coderd};
use crate::support::eventually;
use crate::support::process::tallyline;

/// A build that no page by time reads.
async fn old_build(coderd: &Coderd) {
    let completed_at = coderd.now().await - TimeDelta::hours(5);
    coderd
        .build(&Build { completed_at, ..coderd.first_start(coderd.workspace().await).await })
        .await;
}

#[tokio::test]
async fn a_requested_sweep_is_followed_until_it_is_in_the_ledger() {
    let (mut site, coderd) =
        (Site::new(Kind::Postgres).await, Coderd::new(SchemaVersion::Sep2026).await);
    site.set("source.coderd_url", &format!("'{}'", coderd.database.url));
    site.set("source.deployment_id", &format!("'{}'", coderd.deployment));
    site.set("collect.poll_seconds", "0.2");
    assert!(
        site.refused("collect sweep", 4).await.contains("start a process with the role collect")
    );
    let mut running = site.start("--role collect --role consume");
    eventually(SOON, "the first pass", || async {
        site.count("select coalesce(max(pass_id), 0) from collector_progress").await > 1
    })
    .await;

    old_build(&coderd).await;
    let swept: Value =
        serde_json::from_str(&site.done("collect sweep --output json").await).unwrap();
    assert_eq!(
        (&swept["rows_read"], &swept["appended"], &swept["late"]),
        (&1.into(), &1.into(), &1.into()),
        "{swept}"
    );
    assert_eq!(swept["deployment_id"], coderd.deployment.to_string());
    assert_eq!(
        site.count("select count(*) from workspace_build").await,
        1,
        "the command ends when it is in the ledger"
    );
    assert!(site.done("collect sweep").await.contains("1 rows read, 0 events appended"));

    // Ctrl-C stops watching, not the sweep.
    site.done("pause consume --as user-001 --reason maintenance").await;
    eventually(SOON, "consuming has stopped", || async {
        running.process.stderr().contains("consume is paused")
    })
    .await;
    old_build(&coderd).await;
    let mut watching = tallyline(&["collect", "sweep", "--pipeline", &site.file()], &[]);
    eventually(SOON, "the sweep is recorded", || async {
        site.count("select count(*) from sweep_request where pass_id is not null and rows_read = 2")
            .await
            == 1
    })
    .await;
    watching.signal("INT");
    assert_eq!(watching.ends_within(SOON).await.code(), Some(130));
    assert!(watching.stderr().contains("the sweep continues"), "{}", watching.stderr());
    site.done("resume consume --as user-001 --reason done").await;
    site.builds(2).await;

    site.done("pause collect --as user-001 --reason maintenance").await;
    assert!(site.refused("collect sweep", 4).await.contains("collect is paused by user-001"));
    site.done("resume collect --as user-001 --reason done").await;
    running.process.signal("TERM");
    running.process.ends_within(SOON).await;
    assert!(site.refused("collect sweep", 4).await.contains("no collector runs"));
}
