//! Writes usage events with their publication states.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Context as _;
use chrono::SecondsFormat;
use serde::Serialize;
use uuid::Uuid;

use super::csv::text;
use crate::event::UsageType;
use crate::ledger::{Ledger, Sequence, UsageRange, UsageRow, exports};

const COLUMNS: [&str; 10] = [
    "deployment_id",
    "event_id",
    "event_type",
    "quantity",
    "unit",
    "created_at",
    "publication_state",
    "published_request_id",
    "accepted_sequence",
    "corrected_sequence",
];

/// Totals of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Number of rows without the header.
    pub events: u64,
    /// Totals of each type, by name.
    pub types: Vec<TypeTotal>,
}

/// Totals of one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TypeTotal {
    /// Tallyman's name of the usage type.
    pub event_type: UsageType,
    /// Unit of the quantities.
    pub unit: &'static str,
    /// Number of events.
    pub events: u64,
    /// How quantities are aggregated.
    pub aggregate: Aggregate,
    /// Sum of the deployments' aggregates, in decimal, because it may exceed 64 bits.
    pub quantity: String,
}

/// How a deployment's quantities of one type are aggregated. The aggregates of several deployments
/// are added, because each has its own agents, hours and seats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregate {
    /// The sum of all events.
    Sum,
    /// The maximum. Each event repeats a level, so a sum would count the same seats again.
    Maximum,
}

impl Aggregate {
    fn of(usage_type: UsageType) -> Aggregate {
        if usage_type.adds_up() { Aggregate::Sum } else { Aggregate::Maximum }
    }

    fn add(self, total: u128, quantity: u128) -> u128 {
        match self {
            Aggregate::Sum => total + quantity,
            Aggregate::Maximum => total.max(quantity),
        }
    }
}

type Types = BTreeMap<UsageType, BTreeMap<Uuid, (u64, u128)>>;

/// Writes the range as CSV and returns its totals. A header, then rows by time and id; lines end
/// with a line feed; times are UTC in microseconds.
pub async fn export_usage(
    ledger: &Ledger,
    range: &UsageRange,
    writer: impl Write,
) -> anyhow::Result<Totals> {
    let mut csv = ::csv::Writer::from_writer(writer);
    csv.write_record(COLUMNS)?;
    let mut types = Types::new();
    let reading = ledger.with_statements(exports::STATEMENTS);
    reading
        .run(async |conn| {
            exports::each_usage(conn, range, |row| {
                csv.write_record(fields(&row, range.as_of.incarnation))?;
                let quantity: u128 = row
                    .quantity
                    .parse()
                    .with_context(|| format!("parsing the quantity of {}", row.event_id))?;
                let deployments = types.entry(row.event_type).or_default();
                let (events, total) = deployments.entry(row.deployment_id).or_default();
                *events += 1;
                *total = Aggregate::of(row.event_type).add(*total, quantity);
                Ok::<_, anyhow::Error>(())
            })
            .await
        })
        .await?;
    csv.flush()?;
    Ok(totals(types))
}

fn fields(row: &UsageRow, incarnation: Uuid) -> [String; 10] {
    let sequence = |number| Sequence { incarnation, number }.to_string();
    [
        row.deployment_id.to_string(),
        text(&row.event_id).into_owned(),
        row.event_type.to_string(),
        row.quantity.clone(),
        row.event_type.unit().to_owned(),
        row.created_at.to_rfc3339_opts(SecondsFormat::Micros, true),
        row.publication_state.to_string(),
        row.request_id.map(|id| id.to_string()).unwrap_or_default(),
        sequence(row.sequence),
        row.corrected_sequence.map(sequence).unwrap_or_default(),
    ]
}

fn totals(types: Types) -> Totals {
    let total = |(event_type, deployments): (UsageType, BTreeMap<Uuid, (u64, u128)>)| TypeTotal {
        unit: event_type.unit(),
        aggregate: Aggregate::of(event_type),
        event_type,
        events: deployments.values().map(|(events, _)| events).sum(),
        quantity: deployments.values().map(|(_, quantity)| quantity).sum::<u128>().to_string(),
    };
    let mut types: Vec<TypeTotal> = types.into_iter().map(total).collect();
    types.sort_by_key(|total| total.event_type.as_str());
    Totals { events: types.iter().map(|total| total.events).sum(), types }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_a_maximum_and_everything_else_is_a_sum() {
        for (event_type, total) in
            [(UsageType::ManagedAgents, 12), (UsageType::AgentRuntime, 12), (UsageType::AiSeats, 7)]
        {
            let aggregate = Aggregate::of(event_type);
            assert_eq!(
                [2, 7, 3].into_iter().fold(0, |total, quantity| aggregate.add(total, quantity)),
                total,
                "{event_type}"
            );
        }
    }
}
