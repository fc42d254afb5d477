//! Which process shows the domain series, of which source, and from when.

use std::collections::BTreeMap;
use std::time::Duration;

use tallyline::event::Topic;
use tallyline::ledger::{Sequence, leases, snapshots};

use super::{Process, SOON, Site, fold, get};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, build, claim, take_lease};

/// Sees every page in order of time, from any process, as a server does under one constant
/// instance.
#[derive(Default)]
struct Watcher(BTreeMap<String, f64>);

impl Watcher {
    /// Checks that no series has fallen.
    async fn observe(&mut self, process: &Process) -> bool {
        let page = process.domain("").await;
        for (series, value) in &page {
            let before = self.0.insert(series.clone(), *value);
            assert!(
                before.is_none_or(|before| before <= *value),
                "{series} fell from {before:?} to {value}"
            );
        }
        !page.is_empty()
    }

    fn total(&self) -> f64 {
        self.0
            .iter()
            .filter(|(series, _)| series.starts_with("coderd_workspace_creation_total"))
            .map(|(_, value)| value)
            .sum()
    }
}

/// How a process ends.
#[derive(Clone, Copy)]
enum End {
    Orderly,
    Vanishing,
}

#[tokio::test]
async fn a_handover_lets_no_series_fall_and_one_process_shows_at_a_time() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.pass(&source, 0).await;
    let mut watcher = Watcher::default();
    let mut recorded = 0;
    let mut processes = [site.process().await, site.process().await];
    for end in [End::Orderly, End::Vanishing, End::Orderly, End::Vanishing] {
        // New events come all the time, also while no process or a new one shows the series.
        let mut pages = 0;
        while pages < 5 {
            site.record(
                Topic::WorkspaceBuilds,
                (recorded..recorded + 10).map(|n| build(DEPLOYMENT, n)).collect(),
            )
            .await;
            site.record(Topic::PrebuildClaims, vec![claim(DEPLOYMENT, recorded)]).await;
            recorded += 10;
            let holders =
                [watcher.observe(&processes[0]).await, watcher.observe(&processes[1]).await];
            assert_ne!(holders, [true, true], "no lease ended, and both showed the series");
            pages += usize::from(holders != [false, false]);
        }
        let holds = processes[0].telemetry("tallyline_metrics_lease_held").await > 0.0;
        let holder = usize::from(!holds);
        assert_eq!(processes[1 - holder].telemetry("tallyline_metrics_lease_held").await, 0.0);
        let old = std::mem::replace(&mut processes[holder], site.process().await);
        match end {
            End::Orderly => old.end().await,
            End::Vanishing => old.vanish(),
        }
    }
    let expected = (0..recorded).filter(|n| n % 7 != 3 && n % 5 != 0).count() as f64;
    let epoch = || {
        sqlx::query_scalar::<_, i64>("select epoch from lease where name = 'metrics'")
            .fetch_one(&site.ledger.pool)
    };
    eventually(SOON, "each end was one handover", || async { epoch().await.unwrap() == 5 }).await;
    let deadline = std::time::Instant::now() + SOON;
    while !(watcher.observe(&processes[0]).await || watcher.observe(&processes[1]).await)
        || watcher.total() < expected
    {
        assert!(
            std::time::Instant::now() < deadline,
            "{} of {expected} creations are shown",
            watcher.total()
        );
    }
    assert_eq!(watcher.total(), expected);
}

#[tokio::test]
async fn a_fold_below_the_shown_sequence_is_withheld() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.pass(&source, 0).await;
    site.record(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 1)]).await;
    let current = site.process().await;
    let before = current.shows("").await;
    // Another process's fold freezes here, like its machine or its database connection.
    let slow = site.process().await;
    eventually(SOON, "it knows the ledger's end", || async {
        slow.telemetry("tallyline_ledger_sequence").await > 0.0
    })
    .await;
    slow.folds.cancel();
    site.record(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 2)]).await;
    eventually(SOON, "more is shown", || async {
        current.domain("").await.values().sum::<f64>() > before.values().sum()
    })
    .await;
    let after = current.domain("").await;
    let sequence = current.telemetry("tallyline_shown_sequence").await;
    current.end().await;

    eventually(SOON, "the slow one has the right to show", || async {
        slow.telemetry("tallyline_metrics_lease_held").await > 0.0
    })
    .await;
    assert!(slow.telemetry("tallyline_folded_sequence{stage=\"metrics\"}").await < sequence);
    assert_eq!(slow.domain("").await, BTreeMap::new());
    assert!(slow.telemetry("tallyline_metrics_withheld_total{reason=\"behind\"}").await > 0.0);
    slow.end().await;
    let next = site.process().await;
    assert_eq!(next.shows("").await, after);
}

#[tokio::test]
async fn a_process_with_stalled_folds_yields_to_one_with_working_folds() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.pass(&source, 0).await;
    site.record(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 1)]).await;
    let stuck = site.process_with(|settings, _| settings.fresh = Duration::from_secs(3)).await;
    let before = stuck.shows("").await;
    let current = site.process().await;
    stuck.folds.cancel();
    site.record(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 2)]).await;
    eventually(2 * SOON, "the other process shows the series", || async {
        !current.domain("").await.is_empty()
    })
    .await;
    assert!(current.domain("").await.values().sum::<f64>() > before.values().sum());
    assert_eq!(stuck.telemetry("tallyline_metrics_lease_held").await, 0.0);
    assert_eq!(stuck.domain("").await, BTreeMap::new());
}

#[tokio::test]
async fn a_source_is_withheld_until_its_backfill_is_in_the_ledger() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    let process = site.process().await;
    let withheld = "tallyline_metrics_withheld_total{reason=\"backfilling\"}";
    site.record(Topic::WorkspaceBuilds, (0..50).map(|n| build(DEPLOYMENT, n)).collect()).await;
    eventually(SOON, "the source is known", || async { process.telemetry(withheld).await > 0.0 })
        .await;
    assert_eq!(process.domain("").await, BTreeMap::new(), "no pass");

    // The pass ended ten records beyond the ledger's positions.
    site.pass(&source, 10).await;
    let end = site.ledger.run(snapshots::head).await.unwrap().number as f64;
    eventually(SOON, "the pass is known", || async {
        process.telemetry("tallyline_ledger_sequence").await >= end
    })
    .await;
    assert_eq!(process.domain("").await, BTreeMap::new(), "a pass that is not in the ledger");
    assert_eq!(process.scrape("").await.get(&complete_until()), None);

    site.record(Topic::WorkspaceBuilds, (50..60).map(|n| build(DEPLOYMENT, n)).collect()).await;
    let series = process.shows("").await;
    let total: f64 = series
        .iter()
        .filter(|(series, _)| series.starts_with("coderd_workspace_creation_total"))
        .map(|(_, value)| value)
        .sum();
    assert_eq!(
        total,
        (0..60).filter(|n| n % 7 != 3 && n % 5 != 0).count() as f64,
        "the first page holds all of the backfill"
    );
    assert_eq!(
        process.telemetry(&complete_until()).await,
        crate::support::ledger::noon().timestamp() as f64
    );
}

fn complete_until() -> String {
    format!("tallyline_complete_until_timestamp_seconds{{source=\"{DEPLOYMENT}\"}}")
}

#[tokio::test]
async fn one_source_is_shown_at_a_time() {
    let site = Site::new().await;
    let process = site.process().await;
    let other = site.collected(OTHER_DEPLOYMENT).await;
    site.record(
        Topic::WorkspaceBuilds,
        vec![build(OTHER_DEPLOYMENT, 1), build(OTHER_DEPLOYMENT, 2)],
    )
    .await;
    site.pass(&other, 0).await;
    let first = process.shows("").await;

    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::WorkspaceBuilds, (3..9).map(|n| build(DEPLOYMENT, n)).collect()).await;
    eventually(SOON, "with two, neither is shown unasked", || async {
        process.domain("").await.is_empty()
    })
    .await;
    assert_eq!(process.domain(&format!("&source={OTHER_DEPLOYMENT}")).await, first);
    assert_eq!(process.domain(&format!("&source={DEPLOYMENT}")).await, BTreeMap::new());
    site.pass(&source, 0).await;
    let collected = process.shows(&format!("&source={DEPLOYMENT}")).await;
    assert_ne!(collected, first);
    process.end().await;

    let configured = site.process_with(|settings, _| settings.source = Some(DEPLOYMENT)).await;
    assert_eq!(configured.shows("").await, collected);
    assert_eq!(configured.shows(&format!("&source={OTHER_DEPLOYMENT}")).await, first);

    let (status, problem) =
        get(&format!("{}/metrics?source=00000000-0000-0000-0000-00000000d3d3", configured.metrics))
            .await;
    assert_eq!(status, 404, "{problem}");
    for (query, field) in
        [("source=x", "source"), ("format=json", "format"), ("sources=x", "sources")]
    {
        let (status, problem) = get(&format!("{}/metrics?{query}", configured.metrics)).await;
        assert_eq!((status.as_u16(), problem["field"].as_str()), (400, Some(field)), "{problem}");
    }
}

#[tokio::test]
async fn without_the_database_there_is_telemetry_only() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 1)]).await;
    site.pass(&source, 0).await;
    // It has folded its states; its lease and source queries use connections that end.
    let own = tallyline::ledger::Ledger::open(
        &tallyline::ledger::LedgerSettings { url: site._database.url.clone(), connections: 4 },
        site.ledger.clock.clone(),
    )
    .unwrap();
    let process = site
        .process_with(|_, api| {
            api.own.ledger = own.clone();
            let folds = tokio_util::sync::CancellationToken::new();
            api.metrics = fold(&site.ledger, &folds);
        })
        .await;
    process.shows("").await;
    own.pool.close().await;
    assert_eq!(process.domain("").await, BTreeMap::new());
    eventually(Duration::from_secs(10), "the process knows that its lease ended", || async {
        process.telemetry("tallyline_metrics_lease_held").await == 0.0
    })
    .await;
}

#[tokio::test]
async fn only_the_latest_holder_raises_the_shown_sequence_and_it_never_falls() {
    let site = Site::new().await;
    let ledger = &site.ledger;
    let incarnation = ledger.run(snapshots::head).await.unwrap().incarnation;
    let at = |number| Sequence { incarnation, number };
    let moment = Duration::from_millis(1);
    let first = take_lease(ledger, "metrics", "one", moment).await.unwrap().unwrap();
    assert_eq!(
        ledger
            .run(async |conn| leases::raise_shown_sequence(conn, &first, at(7)).await)
            .await
            .unwrap(),
        Some(7)
    );
    assert_eq!(
        ledger
            .run(async |conn| leases::raise_shown_sequence(conn, &first, at(5)).await)
            .await
            .unwrap(),
        Some(7),
        "a fold below it gets the shown sequence"
    );
    // It has ended, but no other process has taken it: the next holder finds the raised value.
    eventually(SOON, "it ends", || async {
        ledger.run(async |conn| leases::holder(conn, "metrics").await).await.unwrap().is_none()
    })
    .await;
    assert_eq!(
        ledger
            .run(async |conn| leases::raise_shown_sequence(conn, &first, at(8)).await)
            .await
            .unwrap(),
        Some(8)
    );
    let second = take_lease(ledger, "metrics", "other", SOON).await.unwrap().unwrap();
    assert_eq!(
        ledger.run(async |conn| leases::holder(conn, "metrics").await).await.unwrap().as_deref(),
        Some("other")
    );
    assert_eq!(
        ledger
            .run(async |conn| leases::raise_shown_sequence(conn, &first, at(9)).await)
            .await
            .unwrap(),
        None,
        "a process that slept through its lease"
    );
    assert_eq!(
        ledger
            .run(async |conn| leases::raise_shown_sequence(conn, &second, at(1)).await)
            .await
            .unwrap(),
        Some(8)
    );
    let another = Sequence { incarnation: uuid::Uuid::from_u128(1), number: 99 };
    assert_eq!(
        ledger
            .run(async |conn| leases::raise_shown_sequence(conn, &second, another).await)
            .await
            .unwrap(),
        None,
        "a state of an earlier ledger"
    );
}
