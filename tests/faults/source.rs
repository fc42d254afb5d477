//! Faults in coderd: rows that become visible late, a slow clock, and a purge of old builds.

use std::time::Duration;
use tallyline::ledger::{passes, sources};

use chrono::{DateTime, TimeDelta};
use serde_json::Value as Json;
use tallyline::clock::Clock;
use tallyline_sim::coderd::{Config, Purge, SchemaVersion, Simulation};
use uuid::Uuid;

use crate::expected::Numbers;
use crate::inject::MET;
use crate::support::{database, eventually};
use crate::traffic::Coderd;
use crate::world::{World, before_purges};

/// How old late rows are, and rows of a replica with a slow clock. Both exceed the margin (20 s).
const VISIBLE_LATE: TimeDelta = TimeDelta::seconds(90);
const CLOCK_BEHIND: TimeDelta = TimeDelta::minutes(3);
/// Late rows begin their lives within this span.
const LATE_SPAN: TimeDelta = TimeDelta::seconds(30);
const LATE_BUILDS: usize = 60;
/// Late rows are found within a minute, or earlier by the audit.
const BALANCED: Duration = Duration::from_secs(120);
/// Records that come while a clock is behind.
const RECORDS_BY_A_SLOW_CLOCK: i64 = 40;
/// Of the workspaces that lose their first start in a purge, this many start again.
const RESTARTS: i64 = 20;

impl World {
    /// A row is late only if a collector has passed its time.
    async fn collectors_are_up_to_date(&self) {
        eventually(MET, "the source is complete until a minute ago", || async {
            let Ok(Some(source)) =
                self.site.ledger.run(async |conn| sources::get(conn, self.deployment).await).await
            else {
                return false;
            };
            let Ok(completeness) = self
                .site
                .ledger
                .run(async |conn| passes::completeness(conn, source.id).await)
                .await
            else {
                return false;
            };
            completeness
                .complete_until
                .is_some_and(|until| until > Clock::system().now() - TimeDelta::minutes(1))
        })
        .await;
    }

    pub async fn rows_become_visible_late(&mut self, coderd: &Coderd) {
        self.collectors_are_up_to_date().await;
        let until = Clock::system().now() - VISIBLE_LATE;
        let builds = coderd.lock().await.extend_late(until - LATE_SPAN, until, LATE_BUILDS);
        self.late_rows = true;
        self.say(&format!(
            "workspaces of {builds} builds become visible {} s late",
            VISIBLE_LATE.num_seconds()
        ));
    }

    pub async fn source_clock_falls_behind(&mut self, coderd: &Coderd) {
        self.collectors_are_up_to_date().await;
        coderd.lock().await.set_clock_behind(CLOCK_BEHIND);
        self.late_rows = true;
        let before = self.site.appended().await;
        eventually(MET, "records come while a clock is behind", || async {
            self.site.appended().await >= before + RECORDS_BY_A_SLOW_CLOCK
        })
        .await;
    }

    /// The audit confirms the builds first: only confirmed builds may be gone later.
    pub async fn builds_are_purged(&mut self, coderd: &Coderd, roll: u64) {
        self.collectors_are_up_to_date().await;
        eventually(BALANCED, "the books balance before the purge", || async {
            self.site.command(&["audit", "--output", "json"]).await.status.success()
        })
        .await;
        let mut simulation = coderd.lock().await;
        let (start, end) = (simulation.config().start, simulation.config().end);
        // some workspaces lose their first builds and keep later ones
        let tenths = i32::try_from(1 + (roll >> 8) % 8).expect("small");
        let completed_before = start + (end - start) / 10 * tenths;
        let purge =
            Purge { completed_before, jobs_too: roll.is_multiple_of(2), restarts: RESTARTS };
        let removed =
            simulation.purge_builds(purge, Clock::system().now()).await.expect("coderd purges");
        drop(simulation);
        let jobs = if purge.jobs_too { "with their jobs" } else { "without their jobs" };
        self.say(&format!("coderd has removed {} builds {jobs}", removed.len()));
        self.purged.extend(removed);
    }

    /// The report of an audit, which succeeds only if the books balance.
    pub async fn audit(&self) -> Json {
        let audit = self.site.command(&["audit", "--output", "json"]).await;
        assert!(audit.status.success(), "{audit:?}");
        serde_json::from_str(&audit.stdout).unwrap_or_else(|error| panic!("{error}: {audit:?}"))
    }
}

#[tokio::test]
async fn purged_builds_stay_counted_and_a_restart_is_not_a_creation() {
    let database = database().await;
    let end = Clock::system().now();
    let config = Config::history(5, SchemaVersion::Sep2026, end - TimeDelta::days(20), end, 600);
    let mut simulation = Simulation::start(config, &database.url).await.expect("coderd's tables");
    simulation.finish().await.expect("the history");
    let before = simulation.truth();
    let purge =
        Purge { completed_before: end - TimeDelta::days(5), jobs_too: true, restarts: RESTARTS };
    let removed = simulation.purge_builds(purge, end).await.expect("coderd purges");
    simulation.advance_to(end + TimeDelta::minutes(1)).await.expect("coderd lives");

    let truth = simulation.truth();
    let again = truth.builds.len() - before.builds.len();
    assert!(
        again > 10 && removed.len() > 200,
        "{again} starts after {} builds were removed",
        removed.len()
    );
    assert_eq!(truth.creation_totals(), before.creation_totals(), "each creation is counted once");
    let numbers = Numbers::of_truth(&truth, DateTime::UNIX_EPOCH);
    let (full_history, now) = (before_purges(&database.url).await, &database.pool);
    assert_eq!(
        Numbers::of_coderd(&full_history, &truth.names(), DateTime::UNIX_EPOCH).await,
        numbers,
        "as if nothing had been removed"
    );
    assert_ne!(Numbers::of_coderd(now, &truth.names(), DateTime::UNIX_EPOCH).await, numbers);
    let remaining: Vec<Uuid> =
        sqlx::query_scalar("select id from workspace_builds").fetch_all(now).await.expect("builds");
    assert!(removed.iter().all(|id| !remaining.contains(id)));
}
