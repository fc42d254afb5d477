//! Records that are no accepted event, as rows.

use std::collections::HashSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Arrival, Chain, Ledger, Refusal, Verdict};
use crate::event::{self, Event, MAX_ID_BYTES, Message};

/// Conflicts, rejects and held records, raw, once for each place in the log. The row is the live chain's: a replay finds it there, or has run ahead
/// and gives it up.
pub(super) async fn insert_refused(
    tx: &mut PgConnection,
    ledger: &Ledger,
    batch_id: i64,
    chain: &Chain,
    arrivals: &[Arrival],
    conflicts: &HashSet<usize>,
) -> Result<(), sqlx::Error> {
    for (index, arrival) in arrivals.iter().enumerate() {
        let refusal = match &arrival.event {
            Err(refusal) => refusal.clone(),
            Ok(event) if conflicts.contains(&index) => conflict(event),
            Ok(_) => continue,
        };
        insert_reject(tx, ledger, batch_id, chain, arrival, &refusal).await?;
    }
    Ok(())
}

fn conflict(event: &Event) -> Refusal {
    let detail = format!("{} is accepted with other content; the accepted event stands", event.id());
    Refusal { verdict: Verdict::Conflict, cause: "conflict".into(), detail }
}

async fn insert_reject(
    tx: &mut PgConnection,
    ledger: &Ledger,
    batch_id: i64,
    chain: &Chain,
    arrival: &Arrival,
    refusal: &Refusal,
) -> Result<(), sqlx::Error> {
    let traces = Traces::of(arrival);
    sqlx::query(
        "insert into reject (batch_id, topic, partition, generation, log_offset, verdict, cause, detail, deployment_id, event_id, event_type, units,
             record_timestamp, record_key, headers, payload, recorded_at, whole_bytes, whole_sha256)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12::text::numeric, $13, $14, $15, $16, $17, $19, $20)
         on conflict on constraint reject_is_unique do update set batch_id = excluded.batch_id where $18",
    )
    .bind(batch_id)
    .bind(chain.partition().topic.name())
    .bind(chain.partition().partition)
    .bind(chain.generation())
    .bind(arrival.offset)
    .bind(refusal.verdict.as_str())
    .bind(&refusal.cause)
    .bind(refusal.detail.replace('\0', "\u{fffd}"))
    .bind(traces.deployment)
    .bind(traces.event_id)
    .bind(traces.event_type)
    .bind(traces.units.map(|units| units.to_string()))
    .bind(arrival.timestamp)
    .bind(&arrival.message.key)
    .bind(headers_json(&arrival.message))
    .bind(&arrival.message.payload)
    .bind(ledger.clock.now())
    .bind(matches!(chain, Chain::Live(_)))
    .bind(arrival.message.oversized.map(|whole| i64::try_from(whole.bytes).unwrap_or(i64::MAX)))
    .bind(arrival.message.oversized.map(|whole| whole.sha256.to_vec()))
    .execute(tx)
    .await?;
    Ok(())
}

/// A record's headers as they are kept: JSON, `[[name, value in base64 or null], …]`.
pub(super) fn headers_json(message: &Message) -> Vec<u8> {
    let headers: Vec<(&str, Option<String>)> =
        message.headers.iter().map(|(name, value)| (name.as_str(), value.as_ref().map(|value| BASE64.encode(value)))).collect();
    serde_json::to_vec(&headers).unwrap_or_default()
}

/// What can be told about a record that is no event, as it is kept for whoever looks for it.
pub(super) struct Traces {
    pub(super) deployment: Option<Uuid>,
    pub(super) event_id: Option<String>,
    pub(super) event_type: Option<String>,
    pub(super) units: Option<u64>,
}

impl Traces {
    pub(super) fn of(arrival: &Arrival) -> Self {
        let read = match &arrival.event {
            Ok(event) => event::Traces::of_event(event),
            Err(_) => event::Traces::of(&arrival.message),
        };
        Traces {
            deployment: read.deployment,
            event_id: read.id.or_else(|| as_found(&arrival.message, "ce_id")).map(|id| kept(&id, MAX_ID_BYTES)),
            event_type: read.event_type.or_else(|| as_found(&arrival.message, "ce_type")).map(|event_type| kept(&event_type, 200)),
            units: read.units,
        }
    }
}

/// For whoever looks for a record: what its headers say, where nothing better can be read.
fn as_found(message: &Message, name: &str) -> Option<String> {
    let (_, value) = message.headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name))?;
    Some(String::from_utf8_lossy(value.as_deref()?).into_owned())
}

/// Text that PostgreSQL and its indexes can hold, of so many bytes at most.
fn kept(text: &str, most: usize) -> String {
    let mut text = text.replace('\0', "\u{fffd}");
    text.truncate(text.floor_char_boundary(most));
    text
}
