//! Usage events with what became of them.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Context as _;
use chrono::SecondsFormat;
use serde::Serialize;

use super::csv::text;
use crate::ledger::{Ledger, UsageRange, UsageRow};

/// Rows read at a time: what bounds memory.
const PAGE_ROWS: i64 = 5_000;

/// The header row.
const COLUMNS: [&str; 9] = [
    "deployment_id",
    "event_id",
    "event_type",
    "quantity",
    "unit",
    "created_at",
    "publication_state",
    "published_request_id",
    "accepted_sequence",
];

/// What the file adds up to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Rows without the header.
    pub events: u64,
    /// Each type, by name.
    pub types: Vec<TypeTotal>,
}

/// The events of one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TypeTotal {
    /// Tallyman's type.
    pub event_type: String,
    /// What a quantity counts.
    pub unit: &'static str,
    /// How many events.
    pub events: u64,
    /// The sum of their quantities, in decimal: it may be more than 64 bits hold. Of seats, which are a level and no flow, only a check of the file.
    pub quantity: String,
}

/// Writes the range as CSV: a header, then rows by time and id, lines ended by a line feed, times in UTC to the microsecond. Returns the totals.
///
/// # Errors
/// The database's, or the writer's (an [`std::io::Error`] in the chain).
pub async fn export_usage(ledger: &Ledger, range: &UsageRange, writer: impl Write) -> anyhow::Result<Totals> {
    let mut csv = ::csv::Writer::from_writer(writer);
    csv.write_record(COLUMNS)?;
    let mut sums: BTreeMap<String, (u64, u128)> = BTreeMap::new();
    let mut last: Option<UsageRow> = None;
    loop {
        let page = ledger.in_time(ledger.usage_page(range, last.as_ref(), PAGE_ROWS)).await.context("reading usage from the ledger")?;
        for row in &page {
            csv.write_record(fields(row))?;
            let quantity: u128 = row.quantity.parse().with_context(|| format!("the quantity of {}", row.event_id))?;
            let (events, sum) = sums.entry(row.event_type.clone()).or_default();
            *events += 1;
            *sum += quantity;
        }
        match page.into_iter().next_back() {
            Some(row) => last = Some(row),
            None => break,
        }
    }
    csv.flush()?;
    Ok(totals(sums))
}

fn fields(row: &UsageRow) -> [String; 9] {
    [
        row.deployment_id.to_string(),
        text(&row.event_id).into_owned(),
        text(&row.event_type).into_owned(),
        row.quantity.clone(),
        unit(&row.event_type).to_owned(),
        row.created_at.to_rfc3339_opts(SecondsFormat::Micros, true),
        row.publication_state.clone(),
        row.request_id.map(|id| id.to_string()).unwrap_or_default(),
        row.sequence.to_string(),
    ]
}

fn totals(sums: BTreeMap<String, (u64, u128)>) -> Totals {
    let events = sums.values().map(|(events, _)| events).sum();
    let types = sums
        .into_iter()
        .map(|(event_type, (events, sum))| TypeTotal { unit: unit(&event_type), event_type, events, quantity: sum.to_string() })
        .collect();
    Totals { events, types }
}

/// What the type's quantity counts.
fn unit(event_type: &str) -> &'static str {
    match event_type {
        "dc_managed_agents_v1" => "agents",
        "hb_ai_seats_v1" => "seats",
        "hb_agent_runtime_v1" => "ms",
        _ => "",
    }
}
