//! The shown series during an operator's rebuild of the metrics that takes longer than a state may
//! be behind.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::json;
use tallyline::event::Topic;
use tallyline::ledger::{ActKind, Ledger, LedgerSettings, NewAct, Subject, leases, snapshots};
use tallyline::projection::{Folded, fold_to};
use tallyline::stages::{MetricsState, Stage};

use super::{Process, SOON, Site, fold};
use crate::operate::proxy::Proxy;
use crate::support::ledger::{DEPLOYMENT, build, noon};
use crate::support::{eventually, snapshots as snapshots_of};

/// A process whose states are behind for longer than this releases the lease, unless a rebuild
/// runs.
const FRESH: Duration = Duration::from_secs(10);
/// Longer than a renewal can be delayed on a busy machine.
const LEASE: Duration = Duration::from_secs(3);
/// The delay of each statement of the slow fold: a page has about ten, and there are fifty pages.
/// Even on a busy machine a page takes far less than [`FRESH`].
const HELD: Duration = Duration::from_millis(40);
const BUILDS: u32 = 100;
/// Batches without events: pages of a rebuild.
const BATCHES: i32 = 24_000;

/// A site whose snapshot of the metrics lacks one creation in one series, and then a long ledger.
async fn site() -> Site {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.pass(&source, 0).await;
    site.record(Topic::WorkspaceBuilds, (0..BUILDS).map(|n| build(DEPLOYMENT, n)).collect()).await;
    let folded: Folded<MetricsState> = fold_to(&site.ledger, i64::MAX).await.unwrap();
    let mut pieces = snapshots_of::pieces(&folded.state);
    snapshots_of::change_creations(&mut pieces, |value| value - 1);
    assert!(snapshots_of::save::<MetricsState>(&site.ledger, folded.sequence, &pieces).await);
    sqlx::query(
        "insert into batch (kind, recorded_at) select 'operator', $1 from generate_series(1, $2)",
    )
    .bind(noon())
    .bind(BATCHES)
    .execute(&site.ledger.pool)
    .await
    .unwrap();
    site
}

/// A process whose fold of the metrics reads the ledger through `proxy`.
async fn behind(site: &Site, url: &str) -> Process {
    let through = Ledger::open(
        &LedgerSettings { url: url.to_owned(), connections: 2 },
        site.ledger.clock.clone(),
    )
    .unwrap();
    let folds = tokio_util::sync::CancellationToken::new();
    let mut settings = super::settings();
    (settings.fresh, settings.lease_length) = (FRESH, LEASE);
    let api = site.api(&site.ledger, fold(&through, &folds), fold(&site.ledger, &folds));
    Process::start(settings, api, folds).await
}

async fn rebuild(site: &Site) {
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Rebuild,
        subject: Subject::Named(MetricsState::NAME),
        reason: "",
        detail: json!({}),
    };
    site.ledger
        .run(async |conn| {
            snapshots::rebuild(conn, MetricsState::NAME, &act, site.ledger.clock.now()).await
        })
        .await
        .unwrap();
}

fn creations(page: &BTreeMap<String, f64>) -> f64 {
    page.iter()
        .filter(|(series, _)| series.starts_with("coderd_workspace_creation_total"))
        .map(|(_, value)| value)
        .sum()
}

/// Of the builds, by hand: failed builds and the pool's are not creations.
fn truth(builds: u32) -> f64 {
    f64::from((0..builds).filter(|n| n % 7 != 3 && n % 5 != 0).map(|_| 1).sum::<u32>())
}

/// Lets single statements through for `length`, and calls `reader` in between.
async fn held_up(proxy: &Proxy, length: Duration, mut reader: impl AsyncFnMut()) {
    let begun = Instant::now();
    let gates = async {
        while begun.elapsed() < length {
            proxy.freeze_in_transaction(1);
            eventually(SOON, "the fold reads on", || async { proxy.is_frozen() }).await;
            tokio::time::sleep(HELD).await;
            proxy.thaw();
        }
    };
    let reads = async {
        while begun.elapsed() < length {
            reader().await;
            tokio::time::sleep(HELD).await;
        }
    };
    tokio::join!(gates, reads);
}

#[tokio::test]
async fn a_long_rebuild_shows_the_state_before_without_a_gap_until_it_is_done() {
    let site = site().await;
    let (mut proxy, url) = Proxy::to_database(&site._database.url);
    proxy.open().await;
    let first = behind(&site, &url).await;
    let before = first.shows("").await;
    assert_eq!(creations(&before), truth(BUILDS) - 1.0);
    let second = behind(&site, &url).await;
    eventually(SOON, "the second is ready", || async { second.get("/readyz").await.0 == 200 })
        .await;

    rebuild(&site).await;
    site.record(
        Topic::WorkspaceBuilds,
        (BUILDS..BUILDS + 50).map(|n| build(DEPLOYMENT, n)).collect(),
    )
    .await;
    held_up(&proxy, FRESH + LEASE, async || {
        assert_eq!(first.domain("").await, before, "the state before, and no gap");
        assert_eq!(second.domain("").await, BTreeMap::new(), "one process at a time");
        assert_eq!(first.get("/readyz").await.1["checks"]["projections"]["ok"], true);
    })
    .await;

    // The holder dies: another process with a running rebuild shows the same.
    first.vanish();
    let taken_over = std::cell::Cell::new(false);
    held_up(&proxy, 2 * LEASE, async || {
        let page = second.domain("").await;
        assert!(page == before || page.is_empty() && !taken_over.get(), "a gap after the handover");
        taken_over.set(!page.is_empty());
    })
    .await;
    assert!(taken_over.get(), "no other process took over");

    // Every page in between shows the old state, or at least the new one.
    let deadline = Instant::now() + SOON;
    let mut last = creations(&before);
    while last < truth(BUILDS + 50) {
        let page = second.domain("").await;
        assert!(!page.is_empty(), "a gap at the change-over");
        let now = creations(&page);
        assert!(now == last || now >= truth(BUILDS).max(last), "{now} after {last}");
        last = now;
        assert!(Instant::now() < deadline, "{last} creations are shown");
    }
    assert_eq!(last, truth(BUILDS + 50));
}

#[tokio::test]
async fn a_rebuild_below_the_shown_sequence_blocks_no_process_and_a_stalled_one_yields() {
    let site = site().await;
    let (mut proxy, url) = Proxy::to_database(&site._database.url);
    proxy.open().await;
    let slow = behind(&site, &url).await;
    slow.shows("").await;
    rebuild(&site).await;
    held_up(&proxy, FRESH, async || {}).await;
    // No bytes get through any more: its state is old, and another process may show a newer one.
    proxy.freeze();
    let holder = || site.ledger.run(async |conn| leases::holder(conn, "metrics").await);
    eventually(SOON, "the stalled process yields", || async { holder().await.unwrap().is_none() })
        .await;
    assert_eq!(slow.get("/readyz").await.1["checks"]["projections"]["ok"], false);

    // Another process finished, showed that state, and ended.
    sqlx::query("update lease set shown_sequence = (select next_sequence - 1 from ledger) where name = 'metrics'")
        .execute(&site.ledger.pool)
        .await
        .unwrap();
    proxy.thaw();
    let lost = site.ledger.run(snapshots::head).await.unwrap().number;
    held_up(&proxy, 2 * LEASE, async || {
        let folded = slow.telemetry("tallyline_folded_sequence{stage=\"metrics\"}").await;
        assert!(folded < lost as f64, "the test's own ledger is too short");
        assert_eq!(holder().await.unwrap(), None, "it could show nothing");
    })
    .await;
    eventually(SOON, "it is done", || async { creations(&slow.domain("").await) == truth(BUILDS) })
        .await;
}
