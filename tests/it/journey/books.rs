//! The end of the journey: every number against both oracles, the vendor's books, and the commands
//! that prove it.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta};
use serde_json::Value as Json;
use tallyline::clock::Clock;
use tallyline_sim::coderd::Truth;

use super::expected::Numbers;
use super::proof::{EVENTS_IN_A_REQUEST, Proof};
use super::story::Journey;
use crate::support::process::Ended;

impl Journey {
    fn proof<'a>(&'a self, truth: &'a Truth) -> Proof<'a> {
        Proof {
            truth,
            introduced_at: self.introduced_at,
            coderd: &self.coderd.pool,
            site: &self.site,
            serve: &self.serve[0],
        }
    }

    pub async fn every_number_is_true(&mut self) {
        let truth = self.simulation.truth();
        let organizations: BTreeSet<_> =
            truth.builds.iter().map(|build| &build.labels.organization_name).collect();
        assert!(
            truth.builds.len() >= 5000 && truth.usage.len() >= 800 && organizations.len() >= 3,
            "{}",
            truth.builds.len()
        );
        let numbers = Numbers::of_truth(&truth, self.introduced_at);
        assert_ne!(
            Numbers::of_truth(&truth, DateTime::UNIX_EPOCH),
            numbers,
            "the introduction makes a difference"
        );
        self.proof(&truth).series_are_true().await;
        let edges = self.proof(&truth).license_counts_are_true().await;
        assert!(edges >= 9, "usage on both sides of three edges: {edges}");
        self.bill_is_true(&truth).await;
        let (builds, usage) = (truth.builds.len(), truth.usage.len());
        self.done(&format!(
            "every number is true: {builds} builds, {usage} usage rows, {} licenses",
            truth.licenses.len()
        ));
    }

    async fn bill_is_true(&self, truth: &Truth) {
        let publishable: Vec<_> =
            truth.usage.iter().filter(|row| row.published_at.is_none()).collect();
        assert!(publishable.len() < truth.usage.len(), "coderd has published some by itself");
        assert!(
            publishable.iter().any(|row| row.failure_message.is_some()),
            "coderd was refused for now"
        );
        let month_ago = Clock::system().now() - TimeDelta::days(30);
        assert!(publishable.iter().all(|row| row.created_at > month_ago));
        let books = self.tallyman.books();
        let again = self.proof(truth).bill_is_true(&books).await;
        assert!(
            (1..=self.kills_of_publishers * EVENTS_IN_A_REQUEST).contains(&again),
            "{again} delivered again"
        );
        eprintln!(
            "{} billed in {} requests, {again} delivered again",
            books.billed.len(),
            books.requests
        );
    }

    /// Replays the whole log: it adds nothing and changes no number.
    pub async fn replayed_without_effect(&mut self) {
        let page = self.serve[0].domain_lines().await;
        let (truth, books) = (self.simulation.truth(), self.tallyman.books());
        let planned = self
            .succeeds(&["replay", "plan", "--all-topics", "--from", "earliest", "--output", "json"])
            .await;
        let sum = |field: &str| {
            planned["partitions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one[field].as_i64().unwrap())
                .sum::<i64>()
        };
        let records = self.site.appended().await;
        assert_eq!(
            (sum("records"), sum("new_events"), sum("duplicates")),
            (records, 0, records),
            "{planned}"
        );
        for none in ["introduced", "publications", "metrics"] {
            assert_eq!(planned["effect"][none], serde_json::json!([]), "{planned}");
        }
        let windows = planned["effect"]["licenses"].as_array().unwrap();
        assert!(
            !windows.is_empty() && windows.iter().all(|window| window["before"] == window["after"]),
            "{planned}"
        );
        let executed = self
            .succeeds(&[
                "replay",
                "execute",
                "--plan",
                planned["hash"].as_str().unwrap(),
                "--output",
                "json",
            ])
            .await;
        assert_eq!(
            (executed["records"].as_i64(), executed["accepted"].as_i64()),
            (Some(records), Some(0)),
            "{executed}"
        );

        self.all_is_folded().await;
        assert!(page.contains("coderd_workspace_creation_total{"));
        assert!(self.serve[0].domain_lines().await == page, "the series have changed");
        self.proof(&truth).series_are_true().await;
        self.proof(&truth).license_counts_are_true().await;
        assert_eq!(self.tallyman.books(), books);

        let audit = self.succeeds(&["audit", "--output", "json"]).await;
        assert_eq!(audit["balanced"], true, "{audit}");
        for joint in audit["joints"].as_array().unwrap() {
            assert_eq!(
                (
                    joint["differences"].as_array().unwrap().len(),
                    joint["remarks"].as_array().unwrap().len()
                ),
                (0, 0),
                "{joint}"
            );
        }
        let status = self.succeeds(&["status", "--output", "json"]).await;
        assert!(
            status["partitions"].as_array().unwrap().iter().all(|partition| partition["lag"] == 0),
            "{status}"
        );
        let table = self.site.command(&["status"]).await;
        assert!(table.status.success() && table.stdout.contains("published"), "{table:?}");
        self.done(&format!("{records} records replayed without effect, audited"));
    }

    pub async fn succeeds(&self, words: &[&str]) -> Json {
        let ended = self.site.command(words).await;
        assert!(ended.status.success(), "{words:?}: {ended:?}");
        json(&ended)
    }

    /// The audit names each change by hand.
    pub async fn every_tampered_row_is_named(&mut self) {
        let forged = "forged-00000000-0000-4000-8000-000000000000";
        sqlx::query(
            "insert into usage_events (id, event_type, event_data, created_at) values ($1, 'dc_managed_agents_v1', '{\"count\": 1}', $2)",
        )
        .bind(forged)
        .bind(Clock::system().now())
        .execute(&self.coderd.pool)
        .await
        .unwrap();
        assert_eq!(self.differences().await, [("missing".to_owned(), forged.to_owned())]);

        let truth = self.simulation.truth();
        let lost = &truth.usage[truth.usage.len() / 2].id;
        sqlx::query("delete from usage_event where id = $1")
            .bind(lost)
            .execute(&self.site.database.pool)
            .await
            .unwrap();
        let actual = self.differences().await;
        for difference in
            [("missing", forged), ("missing", lost), ("usage_without_publication", lost)]
        {
            assert!(
                actual.contains(&(difference.0.to_owned(), difference.1.to_owned())),
                "{difference:?} is not in {actual:?}"
            );
        }
        assert_eq!(
            actual.iter().filter(|(kind, _)| kind == "batch_without_its_events").count(),
            1,
            "{actual:?}"
        );
        assert_eq!(actual.len(), 4, "{actual:?}");
        self.done("every tampered row is named");
    }

    /// Kind and id of the differences of an audit, which must end with status 1.
    async fn differences(&self) -> Vec<(String, String)> {
        let ended = self.site.command(&["audit", "--patience", "0", "--output", "json"]).await;
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let report = json(&ended);
        let joints = report["joints"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|joint| joint["differences"].as_array().unwrap());
        let text = |value: &Json| value.as_str().unwrap().to_owned();
        joints.map(|difference| (text(&difference["kind"]), text(&difference["id"]))).collect()
    }
}

fn json(ended: &Ended) -> Json {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}
