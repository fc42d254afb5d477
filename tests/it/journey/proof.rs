//! Compares shown and billed numbers with both oracles and the vendor's books.

use std::collections::{BTreeMap, BTreeSet};
use tallyline::ledger::{PublicationState, sources};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::Value as Json;
use sqlx::PgPool;
use tallyline::clock::Clock;
use tallyline_sim::coderd::Truth;
use tallyline_sim::coderd::truth::UsageTruth;
use tallyline_sim::tallyman::Books;

use super::expected::{self, Numbers, Value};
use super::exposition;
use super::site::{Serve, Site};
use super::watch;
use crate::oracle::{self, UsageState};

/// Tallyman's limit for one request.
pub const EVENTS_IN_A_REQUEST: usize = 100;

/// A site without events in flight, and its truth.
pub struct Proof<'a> {
    pub truth: &'a Truth,
    pub introduced_at: DateTime<Utc>,
    pub coderd: &'a PgPool,
    pub site: &'a Site,
    /// The process that shows the domain series.
    pub serve: &'a Serve,
}

impl Proof<'_> {
    /// Checks each bucket, count and sum of every series.
    pub async fn series_are_true(&self) {
        let truth = self.truth;
        let numbers = Numbers::of_truth(truth, self.introduced_at);
        let coderds = Numbers::of_coderd(self.coderd, &truth.names(), self.introduced_at).await;
        assert_eq!(numbers, coderds, "the two oracles");
        assert_eq!(oracle::clock_skews(self.coderd).await as u64, truth.clock_skews);

        let page = exposition::scrape(&self.serve.metrics).await;
        let expected = numbers.series();
        let instants = expected::instants(truth, self.introduced_at);
        for (key, value) in &expected {
            let series = page
                .get(key)
                .unwrap_or_else(|| panic!("{key:?} is not shown, it should be {value:?}"));
            assert_eq!(&series.value, value, "{key:?}");
            let created =
                series.created.unwrap_or_else(|| panic!("{key:?} does not say since when"));
            assert!(
                instants[key].contains(&created),
                "{key:?} begins at {created}, when nothing happened"
            );
        }
        let unexpected: Vec<_> = page.keys().filter(|key| !expected.contains_key(*key)).collect();
        assert!(unexpected.is_empty(), "{unexpected:?}");
        let samples: BTreeMap<String, f64> =
            expected.iter().flat_map(|(key, value)| expected::samples(key, value)).collect();
        assert_eq!(watch::parsed(&self.serve.domain_lines().await), samples, "the text page");
        let native =
            expected.values().filter(|value| matches!(value, Value::Histogram { .. })).count();
        eprintln!("{} series, {native} of them histograms", expected.len());
    }

    /// Checks exact and whole-day counts. Returns on how many sides of the windows' edges there was
    /// usage.
    pub async fn license_counts_are_true(&self) -> usize {
        let truth = self.truth;
        let micro = TimeDelta::microseconds(1);
        let mut edges = 0;
        for license in &truth.licenses {
            let (from, until) = (license.claims.nbf, license.claims.exp);
            assert_eq!(
                self.agents(from, until, "").await,
                truth.managed_agents(from, until),
                "{license:?}"
            );
            assert_eq!(license.managed_agents, truth.managed_agents(from, until));
            let whole_days = oracle::managed_agents_in_whole_days(self.coderd, from, until).await;
            assert_eq!(
                self.agents(from, until, "&days=whole").await as i64,
                whole_days,
                "{license:?}"
            );
            for edge in [from, until] {
                for begin in [edge - micro, edge, edge + micro] {
                    let expected = truth.managed_agents(begin, begin + micro);
                    assert_eq!(self.agents(begin, begin + micro, "").await, expected, "at {begin}");
                    edges += usize::from(expected > 0);
                }
            }
        }
        self.entitlement_is_true().await;
        edges
    }

    async fn agents(&self, start: DateTime<Utc>, end: DateTime<Utc>, more: &str) -> u64 {
        let [start, end] = [start, end].map(|at| at.to_rfc3339_opts(SecondsFormat::AutoSi, true));
        let answer = self
            .serve
            .get(&format!("/api/v1/managed-agents/count?start={start}&end={end}{more}"))
            .await;
        answer["count"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    }

    /// `actual` belongs to the valid license with limits that was issued last.
    async fn entitlement_is_true(&self) {
        let truth = self.truth;
        let now = Clock::system().now();
        let valid = truth.licenses.iter().filter(|license| {
            license.verifiable && license.claims.nbf <= now && now < license.claims.exp
        });
        let limited = valid
            .filter(|license| license.claims.features.contains_key("managed_agent_limit_soft"));
        let winner =
            limited.max_by_key(|license| license.claims.iat).expect("a license with limits");
        let answer = self.serve.get("/api/v2/entitlements").await;
        let feature = &answer["features"]["managed_agent_limit"];
        let limits = ["managed_agent_limit_hard", "managed_agent_limit_soft"]
            .map(|name| winner.claims.features[name]);
        assert_eq!(feature["actual"].as_u64(), Some(winner.managed_agents), "{answer}");
        assert_eq!(
            [&feature["limit"], &feature["soft_limit"]].map(Json::as_i64),
            limits.map(Some),
            "{answer}"
        );
    }

    /// Checks that each event that coderd has not published is billed once, with its value, in
    /// identical bytes each time. Returns the number of repeated deliveries.
    pub async fn bill_is_true(&self, books: &Books) -> usize {
        let truth = self.truth;
        let unpublished = |row: &&UsageTruth| row.published_at.is_none();
        let publishable: BTreeMap<&str, &UsageTruth> =
            truth.usage.iter().filter(unpublished).map(|row| (row.id.as_str(), row)).collect();
        let states = oracle::usage_states(self.coderd, Clock::system().now()).await;
        let open = |state: &UsageState| {
            matches!(state, UsageState::Pending | UsageState::PendingAfterFailure)
        };
        let left: BTreeSet<&str> =
            states.iter().filter(|(_, state)| open(state)).map(|(id, _)| id.as_str()).collect();
        assert_eq!(left, publishable.keys().copied().collect(), "the two oracles");

        let billed: BTreeSet<&str> = books.billed.iter().map(|billed| billed.id.as_str()).collect();
        assert_eq!(billed, publishable.keys().copied().collect());
        for billed in &books.billed {
            let row = publishable[billed.id.as_str()];
            let data: Json = serde_json::from_str(&row.event_type.data(row.quantity)).unwrap();
            let (kind, at) = (row.event_type.event_type(), row.created_at);
            assert_eq!(
                (billed.times, billed.deployment_id),
                (1, truth.deployment_id),
                "{billed:?}"
            );
            assert_eq!(
                (billed.event_type.as_str(), &billed.event_data, billed.created_at),
                (kind, &data, at),
                "{billed:?}"
            );
        }
        let source = self
            .site
            .ledger
            .run(async |conn| sources::get(conn, truth.deployment_id).await)
            .await
            .unwrap()
            .expect("introduced");
        let query = "select state, count(*) from publication where source_id = $1 group by state order by state";
        let counts: Vec<(PublicationState, i64)> =
            sqlx::query_as(query).bind(source.id).fetch_all(&self.site.ledger.pool).await.unwrap();
        let expected = [
            (PublicationState::NotOurs, truth.usage.len() - publishable.len()),
            (PublicationState::Published, publishable.len()),
        ];
        assert_eq!(counts, expected.map(|(state, rows)| (state, rows as i64)));
        redelivered(books)
    }
}

fn redelivered(books: &Books) -> usize {
    let mut texts: BTreeMap<&str, &str> = BTreeMap::new();
    let mut again = 0;
    for delivery in &books.deliveries {
        assert!(delivery.outcome.is_accepted(), "{delivery:?}");
        if let Some(text) = texts.insert(&delivery.id, &delivery.json) {
            assert_eq!(text, delivery.json, "the same event is always the same bytes");
            again += 1;
        }
    }
    again
}
