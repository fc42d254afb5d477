//! Conditions that must hold after all faults.

use std::time::Duration;
use tallyline::ledger::{books, snapshots, sources};

use serde_json::Value as Json;
use tallyline_sim::coderd::Truth;

use crate::proof::{EVENTS_IN_A_REQUEST, Proof};
use crate::support::eventually;
use crate::watch::Observations;
use crate::world::{REQUESTS_IN_FLIGHT, World};

/// All events in flight arrive within this. It covers the takeover of a dead collector (17 s, its
/// lease), its pass, the log and the folds. It also covers a publisher that waits up to 15 s after
/// failures.
pub const SETTLED: Duration = Duration::from_secs(60);
/// The ledger has late rows of coderd within this: once a minute a pass rereads the last hour. The
/// audit may request them sooner.
const LATE_ROWS_FOUND: Duration = Duration::from_secs(60 + 30);

impl World {
    /// Waits until the ledger has all of coderd and every publication is settled.
    pub async fn settle(&mut self, truth: &Truth) {
        eventually(SETTLED, "the source is introduced", || async {
            self.site
                .ledger
                .run(async |conn| sources::get(conn, truth.deployment_id).await)
                .await
                .unwrap()
                .is_some()
        })
        .await;
        let source_id = self
            .site
            .ledger
            .run(async |conn| sources::get(conn, truth.deployment_id).await)
            .await
            .unwrap()
            .expect("introduced")
            .id;
        let newest = self
            .site
            .ledger
            .run(async |conn| books::newest_pass(conn, source_id).await)
            .await
            .unwrap();
        eventually(SETTLED, "all that coderd committed is in the ledger", || async {
            self.site
                .ledger
                .run(async |conn| books::later_pass_is_in(conn, source_id, newest).await)
                .await
                .unwrap()
        })
        .await;
        if self.late_rows {
            let rows = truth.builds.len() + truth.usage.len();
            eventually(
                LATE_ROWS_FOUND,
                "every row that coderd wrote late is in the ledger",
                || self.has_accepted(rows),
            )
            .await;
        }
        self.say("all of coderd is in the ledger");
        // if the machine is so busy that the simulated coderd commits rows late, the run proves
        // nothing
        let late = "select late from collector_progress";
        let late: i64 = sqlx::query_scalar(late).fetch_one(&self.site.database.pool).await.unwrap();
        if self.late_rows {
            assert!(
                late > 0,
                "rows that the simulated coderd wrote late were found, and counted as late"
            );
        } else {
            assert_eq!(
                late, 0,
                "the simulated coderd committed later than the margin allows: this machine is too busy"
            );
        }
        eventually(SETTLED, "the log is read to its ends", || self.site.has_read_all()).await;
        let pending = "select count(*) from publication where state = 'pending'";
        eventually(SETTLED, "every publication is settled", || async {
            sqlx::query_scalar::<_, i64>(pending).fetch_one(&self.site.database.pool).await.unwrap()
                == 0
        })
        .await;
        self.say("every publication is settled");
        let sequence = self.site.ledger.run(snapshots::head).await.unwrap().number;
        let serve = self.shows(SETTLED).await;
        eventually(SETTLED, "the folds are at the ledger's end", || serve.has_folded(sequence))
            .await;
        self.say("the folds are at the ledger's end");
    }

    /// Whether the ledger has this number of builds and usage rows.
    async fn has_accepted(&self, rows: usize) -> bool {
        let accepted =
            "select (select count(*) from workspace_build) + (select count(*) from usage_event)";
        let accepted: i64 =
            sqlx::query_scalar(accepted).fetch_one(&self.site.database.pool).await.unwrap();
        usize::try_from(accepted) == Ok(rows)
    }

    /// Checks every number against both oracles, the vendor's books, and the audit. Returns a
    /// report.
    pub async fn proves(&mut self, truth: &Truth) -> String {
        let again = self.every_number_is_true(truth).await;
        let most = self.answers_lost * REQUESTS_IN_FLIGHT * EVENTS_IN_A_REQUEST;
        assert!(again <= most, "{again} delivered again, at most {most} can have been in flight");
        let duplicates = self.audited(truth).await;
        self.say("the books balance");
        let pages = self.no_series_fell().await;
        let (builds, usage) = (truth.builds.len(), truth.usage.len());
        format!(
            "{builds} builds, {usage} usage; {duplicates} duplicates, {again} of at most {most} delivered again; {pages} pages; slowest {:.1?}",
            self.slowest
        )
    }

    /// Checks both oracles and the vendor's books. Returns the number of repeated deliveries.
    pub async fn every_number_is_true(&self, truth: &Truth) -> usize {
        let serve = self.shows(SETTLED).await;
        let proof = Proof {
            truth,
            introduced_at: self.introduced_at,
            coderd: &self.coderd_before_purges,
            site: &self.site,
            serve,
        };
        proof.series_are_true().await;
        proof.license_counts_are_true().await;
        let again = proof.bill_is_true(&self.tallyman.books()).await;
        self.say("every number is true");
        again
    }

    /// Checks all pages; returns their number.
    pub async fn no_series_fell(&mut self) -> usize {
        let Observations { pages, changed, faults, .. } =
            self.watch.take().expect("it watches").end().await;
        assert!(
            faults.is_empty(),
            "{} faults of the series: {:?}",
            faults.len(),
            &faults[..faults.len().min(5)]
        );
        assert!(pages > 0 && changed > 0, "{changed} of {pages} pages were new");
        pages
    }

    /// Returns the number of duplicates.
    async fn audited(&self, truth: &Truth) -> i64 {
        let report = self.audit().await;
        assert_eq!(report["balanced"], true, "{report}");
        let joints = report["joints"].as_array().expect("joints");
        assert!(
            joints.iter().all(|joint| joint["differences"] == serde_json::json!([])),
            "{report}"
        );
        let numbers = &joints
            .iter()
            .find(|joint| joint["name"] == "log and ledger")
            .expect("the joint")["numbers"];
        let number =
            |name: &str| numbers[name].as_i64().unwrap_or_else(|| panic!("{name}: {numbers}"));
        let foreign = i64::try_from(self.foreign_records).expect("small");
        assert_eq!(["conflicts", "rejects", "held"].map(number), [0, foreign, 0], "{report}");
        self.removed_builds_are_gone(joints).await;
        self.no_partition_lags().await;
        // every build, claim and usage row exactly once
        let claims: i64 = sqlx::query_scalar("select count(*) from prebuild_claim")
            .fetch_one(&self.site.database.pool)
            .await
            .unwrap();
        let expected =
            i64::try_from(truth.builds.len() + truth.usage.len()).expect("small") + claims;
        assert_eq!(
            (number("accepted"), self.site.accepted().await),
            (expected, expected),
            "{report}"
        );
        number("duplicates")
    }

    /// Each build that coderd removed, with its claim, is counted and is not a difference.
    async fn removed_builds_are_gone(&self, joints: &[Json]) {
        let claims = "select count(*) from prebuild_claim where build_id = any($1)";
        let claims =
            sqlx::query_scalar(claims).bind(&self.purged).fetch_one(&self.site.database.pool);
        let claims: i64 = claims.await.expect("claims");
        let source =
            joints.iter().find(|joint| joint["name"] == "source and ledger").expect("the joint");
        let gone = source["numbers"]["source_gone"].as_i64().unwrap_or_default();
        assert_eq!(gone, i64::try_from(self.purged.len()).expect("small") + claims, "{source}");
    }

    /// Holds even if foreign transactions are at the ends of partitions.
    async fn no_partition_lags(&self) {
        let partitions = self.partitions().await;
        assert!(
            !partitions.is_empty() && partitions.iter().all(|partition| partition["lag"] == 0),
            "{partitions:?}"
        );
    }

    /// The partitions in `status`.
    pub async fn partitions(&self) -> Vec<Json> {
        let ended = self.site.command(&["status", "--output", "json"]).await;
        let mut status: Json = serde_json::from_str(&ended.stdout)
            .unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        let Json::Array(partitions) = status["partitions"].take() else { panic!("{ended:?}") };
        partitions
    }
}
