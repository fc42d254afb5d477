//! The demo's final summary.

use std::collections::BTreeMap;

use serde::Serialize;
use tallyline::audit::AuditReport;
use tallyline::cli::{audit, columns};
use tallyline::ledger::{PublicationState, contents};
use tallyline::projection::fold_to;
use tallyline::stages::MetricsState;

use super::world::World;

/// The simulators' own books compared with the counted and billed numbers.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    comparisons: Vec<Comparison>,
    /// Usage events by publication state.
    publications: BTreeMap<String, i64>,
    audit: AuditReport,
}

/// One number of the simulators and of Tallyline.
#[derive(Debug, Serialize)]
struct Comparison {
    what: &'static str,
    happened: u64,
    counted: u64,
}

impl Summary {
    pub async fn of(world: &World, audit: AuditReport) -> anyhow::Result<Self> {
        let (truth, ledger) = (world.truth()?, &world.site.ledger.ledger);
        let contents =
            ledger.run(async |conn| contents::read(conn, ledger.clock.now()).await).await?;
        let events = |event_type: &str| {
            let counts = contents.events.iter().filter(|count| count.event_type == event_type);
            counts.map(|count| u64::try_from(count.events).unwrap_or_default()).sum::<u64>()
        };
        let usage = events("dc_managed_agents_v1")
            + events("hb_ai_seats_v1")
            + events("hb_agent_runtime_v1");
        let folded = fold_to::<MetricsState>(ledger, i64::MAX).await?;
        let creations: u64 = folded
            .state
            .deployment(truth.deployment_id)
            .map_or(0, |metrics| metrics.creations.iter().map(|(_, counter)| counter.value).sum());
        let books = world.tallyman.books();
        let published =
            contents.publications.iter().filter(|count| count.state == PublicationState::Published);
        let published: u64 =
            published.map(|count| u64::try_from(count.events).unwrap_or_default()).sum();
        let comparisons = vec![
            Comparison {
                what: "completed builds",
                happened: truth.builds.len() as u64,
                counted: events("workspace_build_completed_v1"),
            },
            Comparison {
                what: "workspace creations",
                happened: truth.creation_totals().values().sum(),
                counted: creations,
            },
            Comparison { what: "usage events", happened: truth.usage.len() as u64, counted: usage },
            Comparison {
                what: "billed, and published",
                happened: books.billed.iter().map(|billed| billed.times as u64).sum(),
                counted: published,
            },
        ];
        let publications = contents
            .publications
            .into_iter()
            .map(|count| (count.state.to_string(), count.events))
            .collect();
        Ok(Summary { comparisons, publications, audit })
    }

    /// Whether the books balance and every comparison is equal.
    pub fn balances(&self) -> bool {
        self.audit.balanced
            && self.comparisons.iter().all(|comparison| comparison.happened == comparison.counted)
    }

    /// The summary for people.
    pub fn table(&self) -> String {
        let rows = self
            .comparisons
            .iter()
            .map(|row| [row.what.to_owned(), row.happened.to_string(), row.counted.to_string()]);
        let states = self
            .publications
            .iter()
            .map(|(state, events)| [state.replace('_', " "), events.to_string()]);
        format!(
            "{}\n{}\n{}",
            columns(["SIMULATED AGAINST TALLYLINE", "HAPPENED", "COUNTED"], rows),
            columns(["USAGE", "EVENTS"], states),
            audit::table(&self.audit)
        )
    }
}
