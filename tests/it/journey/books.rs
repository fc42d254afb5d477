//! The end of the journey: every number against both oracles, the vendor's books, and the commands that prove it.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::Value as Json;
use tallyline::clock::Clock;
use tallyline::sim::coderd::Truth;
use tallyline::sim::coderd::truth::UsageTruth;
use tallyline::sim::tallyman::Books;

use super::expected::{self, Numbers, Value};
use super::exposition;
use super::story::Journey;
use super::watch;
use crate::oracle::{self, UsageState};
use crate::support::process::Ended;

/// Tallyman takes no more in one request.
const EVENTS_IN_A_REQUEST: usize = 100;

impl Journey {
    pub async fn every_number_is_true(&mut self) {
        let truth = self.simulation.truth();
        let organizations: BTreeSet<_> = truth.builds.iter().map(|build| &build.labels.organization_name).collect();
        assert!(truth.builds.len() >= 5000 && truth.usage.len() >= 800 && organizations.len() >= 3, "{}", truth.builds.len());
        self.series_are_true(&truth).await;
        self.license_counts_are_true(&truth).await;
        self.bill_is_true(&truth).await;
        let (builds, usage) = (truth.builds.len(), truth.usage.len());
        self.done(&format!("every number is true: {builds} builds, {usage} usage rows, {} licenses", truth.licenses.len()));
    }

    /// Each bucket, count and sum of every series.
    async fn series_are_true(&self, truth: &Truth) {
        let numbers = Numbers::of_truth(truth, self.introduced_at);
        let coderds = Numbers::of_coderd(&self.coderd.pool, &truth.names(), self.introduced_at).await;
        assert_eq!(numbers, coderds, "the two oracles");
        assert_eq!(oracle::clock_skews(&self.coderd.pool).await as u64, truth.clock_skews);
        let from_the_beginning = Numbers::of_truth(truth, DateTime::UNIX_EPOCH);
        assert_ne!(from_the_beginning, numbers, "the introduction makes a difference");

        let shown = exposition::scrape(&self.serve[0].metrics).await;
        let expected = numbers.series();
        let instants = expected::instants(truth, self.introduced_at);
        for (key, value) in &expected {
            let series = shown.get(key).unwrap_or_else(|| panic!("{key:?} is not shown, it should be {value:?}"));
            assert_eq!(&series.value, value, "{key:?}");
            let created = series.created.unwrap_or_else(|| panic!("{key:?} does not say since when"));
            assert!(instants[key].contains(&created), "{key:?} begins at {created}, when nothing happened");
        }
        let unexpected: Vec<_> = shown.keys().filter(|key| !expected.contains_key(*key)).collect();
        assert!(unexpected.is_empty(), "{unexpected:?}");
        let samples: BTreeMap<String, f64> = expected.iter().flat_map(|(key, value)| expected::samples(key, value)).collect();
        assert_eq!(watch::parsed(&self.serve[0].domain_lines().await), samples, "the text page");
        let native = expected.values().filter(|value| matches!(value, Value::Histogram { .. })).count();
        eprintln!("{} series, {native} of them histograms", expected.len());
    }

    /// To the microsecond, and in coderd's whole days.
    async fn license_counts_are_true(&self, truth: &Truth) {
        let micro = TimeDelta::microseconds(1);
        let mut edges = 0;
        for license in &truth.licenses {
            let (from, until) = (license.claims.nbf, license.claims.exp);
            assert_eq!(self.agents(from, until, "").await, truth.managed_agents(from, until), "{license:?}");
            assert_eq!(license.managed_agents, truth.managed_agents(from, until));
            let whole_days = oracle::managed_agents_in_whole_days(&self.coderd.pool, from, until).await;
            assert_eq!(self.agents(from, until, "&days=whole").await as i64, whole_days, "{license:?}");
            for edge in [from, until] {
                for begin in [edge - micro, edge, edge + micro] {
                    let expected = truth.managed_agents(begin, begin + micro);
                    assert_eq!(self.agents(begin, begin + micro, "").await, expected, "at {begin}");
                    edges += usize::from(expected > 0);
                }
            }
        }
        assert!(edges >= 9, "usage on both sides of three edges: {edges}");
        self.entitlement_is_true(truth).await;
    }

    async fn agents(&self, start: DateTime<Utc>, end: DateTime<Utc>, more: &str) -> u64 {
        let [start, end] = [start, end].map(|at| at.to_rfc3339_opts(SecondsFormat::AutoSi, true));
        let answer = self.serve[0].get(&format!("/api/v1/managed-agents/count?start={start}&end={end}{more}")).await;
        answer["count"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    }

    /// `actual` is that of the valid license with limits that was issued last.
    async fn entitlement_is_true(&self, truth: &Truth) {
        let now = Clock::system().now();
        let valid = truth.licenses.iter().filter(|license| license.verifiable && license.claims.nbf <= now && now < license.claims.exp);
        let limited = valid.filter(|license| license.claims.features.contains_key("managed_agent_limit_soft"));
        let winner = limited.max_by_key(|license| license.claims.iat).expect("a license with limits");
        let answer = self.serve[0].get("/api/v2/entitlements").await;
        let feature = &answer["features"]["managed_agent_limit"];
        let limits = ["managed_agent_limit_hard", "managed_agent_limit_soft"].map(|name| winner.claims.features[name]);
        assert_eq!(feature["actual"].as_u64(), Some(winner.managed_agents), "{answer}");
        assert_eq!([&feature["limit"], &feature["soft_limit"]].map(Json::as_i64), limits.map(Some), "{answer}");
    }

    /// Each event that coderd has not published is billed once, under the same bytes however often it was sent.
    async fn bill_is_true(&self, truth: &Truth) {
        let books = self.tallyman.books();
        let ours = |row: &&UsageTruth| row.published_at.is_none();
        let publishable: BTreeMap<&str, &UsageTruth> = truth.usage.iter().filter(ours).map(|row| (row.id.as_str(), row)).collect();
        assert!(publishable.len() < truth.usage.len(), "coderd has published some by itself");
        assert!(publishable.values().any(|row| row.failure_message.is_some()), "coderd was refused for now");
        let month_ago = Clock::system().now() - TimeDelta::days(30);
        assert!(publishable.values().all(|row| row.created_at > month_ago));

        let states = oracle::usage_states(&self.coderd.pool, Clock::system().now()).await;
        let open = |state: &UsageState| matches!(state, UsageState::Pending | UsageState::PendingAfterFailure);
        let left: BTreeSet<&str> = states.iter().filter(|(_, state)| open(state)).map(|(id, _)| id.as_str()).collect();
        assert_eq!(left, publishable.keys().copied().collect(), "the two oracles");

        let billed: BTreeSet<&str> = books.billed.iter().map(|billed| billed.id.as_str()).collect();
        assert_eq!(billed, publishable.keys().copied().collect());
        for billed in &books.billed {
            let row = publishable[billed.id.as_str()];
            let data: Json = serde_json::from_str(&row.event_type.data(row.quantity)).unwrap();
            let (kind, at) = (row.event_type.event_type(), row.created_at);
            assert_eq!((billed.times, billed.deployment_id), (1, truth.deployment_id), "{billed:?}");
            assert_eq!((billed.event_type.as_str(), &billed.event_data, billed.created_at), (kind, &data, at), "{billed:?}");
        }
        let source = self.site.ledger.source(truth.deployment_id).await.unwrap().expect("introduced");
        let counts = self.site.ledger.publication_counts(source.id).await.unwrap();
        let expected = [("not_ours", truth.usage.len() - publishable.len()), ("published", publishable.len())];
        assert_eq!(counts, expected.map(|(state, rows)| (state.to_owned(), rows as i64)).into());
        let again = self.redelivered(&books);
        eprintln!("{} billed in {} requests, {again} delivered again", books.billed.len(), books.requests);
    }

    fn redelivered(&self, books: &Books) -> usize {
        let mut texts: BTreeMap<&str, &str> = BTreeMap::new();
        let mut again = 0;
        for delivery in &books.deliveries {
            assert!(delivery.outcome.taken(), "{delivery:?}");
            if let Some(text) = texts.insert(&delivery.id, &delivery.json) {
                assert_eq!(text, delivery.json, "the same event is always the same bytes");
                again += 1;
            }
        }
        assert!((1..=self.kills_of_publishers * EVENTS_IN_A_REQUEST).contains(&again), "{again} delivered again");
        again
    }

    /// The whole log is read again: nothing is new, and no number changes.
    pub async fn replayed_without_effect(&mut self) {
        let page = self.serve[0].domain_lines().await;
        let (truth, books) = (self.simulation.truth(), self.tallyman.books());
        let planned = self.succeeds(&["replay", "plan", "--all-topics", "--from", "earliest", "--output", "json"]).await;
        let sum = |field: &str| planned["partitions"].as_array().unwrap().iter().map(|one| one[field].as_i64().unwrap()).sum::<i64>();
        let records = self.site.appended().await;
        assert_eq!((sum("records"), sum("new_events"), sum("duplicates")), (records, 0, records), "{planned}");
        let executed = self.succeeds(&["replay", "execute", "--plan", planned["hash"].as_str().unwrap(), "--output", "json"]).await;
        assert_eq!((executed["records"].as_i64(), executed["accepted"].as_i64()), (Some(records), Some(0)), "{executed}");

        self.all_is_folded().await;
        assert!(page.contains("coderd_workspace_creation_total{"));
        assert!(self.serve[0].domain_lines().await == page, "the series have changed");
        self.series_are_true(&truth).await;
        self.license_counts_are_true(&truth).await;
        assert_eq!(self.tallyman.books(), books);

        let audit = self.succeeds(&["audit", "--output", "json"]).await;
        assert_eq!(audit["balanced"], true, "{audit}");
        for joint in audit["joints"].as_array().unwrap() {
            assert_eq!((joint["differences"].as_array().unwrap().len(), joint["remarks"].as_array().unwrap().len()), (0, 0), "{joint}");
        }
        let status = self.succeeds(&["status", "--output", "json"]).await;
        assert!(status["partitions"].as_array().unwrap().iter().all(|partition| partition["lag"] == 0), "{status}");
        let table = self.site.command(&["status"]).await;
        assert!(table.status.success() && table.stdout.contains("published"), "{table:?}");
        self.done(&format!("{records} records replayed without effect, audited"));
    }

    pub async fn succeeds(&self, words: &[&str]) -> Json {
        let ended = self.site.command(words).await;
        assert!(ended.status.success(), "{words:?}: {ended:?}");
        json(&ended)
    }

    /// What is done behind Tallyline's back is found, by name.
    pub async fn what_is_tampered_with_is_named(&mut self) {
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
        sqlx::query("delete from usage_event where id = $1").bind(lost).execute(&self.site.database.pool).await.unwrap();
        let found = self.differences().await;
        for difference in [("missing", forged), ("missing", lost), ("usage_without_publication", lost)] {
            assert!(found.contains(&(difference.0.to_owned(), difference.1.to_owned())), "{difference:?} is not in {found:?}");
        }
        assert_eq!(found.iter().filter(|(kind, _)| kind == "batch_without_its_events").count(), 1, "{found:?}");
        assert_eq!(found.len(), 4, "{found:?}");
        self.done("what was tampered with is named");
    }

    /// Kind and id of what an audit lists, which must end with status 1.
    async fn differences(&self) -> Vec<(String, String)> {
        let ended = self.site.command(&["audit", "--patience", "0", "--output", "json"]).await;
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let report = json(&ended);
        let joints = report["joints"].as_array().unwrap().iter().flat_map(|joint| joint["differences"].as_array().unwrap());
        let text = |value: &Json| value.as_str().unwrap().to_owned();
        joints.map(|difference| (text(&difference["kind"]), text(&difference["id"]))).collect()
    }
}

fn json(ended: &Ended) -> Json {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}
