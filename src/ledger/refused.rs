//! Rows of records that are not accepted.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Arrival, Chain, Disposition, Refusal};
use crate::event::{self, Event, MAX_ID_BYTES, Message, RejectCause};

impl Refusal {
    /// An accepted event has the same id and other content.
    pub(super) fn conflict(event: &Event) -> Self {
        let detail = format!(
            "{}: already accepted with other content; the accepted event remains",
            event.id()
        );
        Refusal { disposition: Disposition::Conflict, cause: RejectCause::Conflict, detail }
    }

    #[must_use]
    pub fn unregistered(deployment: Uuid) -> Self {
        let detail = format!(
            "source /coder/{deployment}: no collector has registered this deployment; registering it admits the record"
        );
        Refusal { disposition: Disposition::Held, cause: RejectCause::UnregisteredSource, detail }
    }
}

/// Inserts conflicts, rejects and held records with their raw records, once per place in the log.
/// The row belongs to the live chain. A replay keeps an existing row, and the live chain takes over
/// a replay's row.
pub(super) async fn insert_refused(
    tx: &mut PgConnection,
    now: DateTime<Utc>,
    batch_id: i64,
    chain: &Chain,
    arrivals: &[Arrival],
    judged: &HashMap<usize, Refusal>,
) -> Result<(), sqlx::Error> {
    let refused = arrivals.iter().enumerate().filter_map(|(index, arrival)| match &arrival.event {
        Err(refusal) => Some((arrival, refusal)),
        Ok(_) => Some((arrival, judged.get(&index)?)),
    });
    let (mut rows, mut bytes) = (Vec::new(), 0);
    for (arrival, refusal) in refused {
        bytes += arrival.message.payload.as_deref().map_or(0, <[u8]>::len);
        rows.push(NewReject { arrival, refusal, traces: RejectTraces::of(arrival) });
        if bytes >= STATEMENT_BYTES {
            insert(tx, now, batch_id, chain, &rows).await?;
            (rows, bytes) = (Vec::new(), 0);
        }
    }
    if rows.is_empty() { Ok(()) } else { insert(tx, now, batch_id, chain, &rows).await }
}

/// Maximum size of the bodies in one statement, which limits its memory.
const STATEMENT_BYTES: usize = 16 * 1024 * 1024;

struct NewReject<'a> {
    arrival: &'a Arrival,
    refusal: &'a Refusal,
    traces: RejectTraces,
}

async fn insert(
    tx: &mut PgConnection,
    now: DateTime<Utc>,
    batch_id: i64,
    chain: &Chain,
    rows: &[NewReject<'_>],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into reject (batch_id, topic, partition, generation, recorded_at, log_offset, disposition, cause, detail, deployment_id, event_id,
             event_type, units, record_timestamp, record_key, headers, payload, whole_bytes, whole_sha256)
         select $1, $2, $3, $4, $5, log_offset, disposition, cause, detail, deployment, event_id, event_type, units::numeric, at, key, headers, payload,
             whole_bytes, whole_sha256
         from unnest($6::bigint[], $7::text[], $8::text[], $9::text[], $10::uuid[], $11::text[], $12::text[], $13::text[], $14::timestamptz[],
             $15::bytea[], $16::bytea[], $17::bytea[], $19::bigint[], $20::bytea[])
             as new (log_offset, disposition, cause, detail, deployment, event_id, event_type, units, at, key, headers, payload,
                 whole_bytes, whole_sha256)
         order by log_offset
         on conflict on constraint reject_is_unique do update
             set replay_batch_id = reject.batch_id, batch_id = excluded.batch_id where $18",
    )
    .bind(batch_id)
    .bind(chain.partition().topic.name())
    .bind(chain.partition().partition)
    .bind(chain.generation())
    .bind(now)
    .bind(column(rows, |row| row.arrival.offset))
    .bind(column(rows, |row| row.refusal.disposition))
    .bind(column(rows, |row| row.refusal.cause))
    .bind(column(rows, |row| row.refusal.detail.replace('\0', "\u{fffd}")))
    .bind(column(rows, |row| row.traces.deployment))
    .bind(column(rows, |row| row.traces.event_id.as_deref()))
    .bind(column(rows, |row| row.traces.event_type.as_deref()))
    .bind(column(rows, |row| row.traces.units.map(|units| units.to_string())))
    .bind(column(rows, |row| row.arrival.timestamp))
    .bind(column(rows, |row| row.arrival.message.key.as_deref()))
    .bind(column(rows, |row| row.arrival.message.headers_json()))
    .bind(column(rows, |row| row.arrival.message.payload.as_deref()))
    .bind(matches!(chain, Chain::Live(_)))
    .bind(column(rows, |row| row.arrival.message.oversized.map(|whole| i64::try_from(whole.bytes).unwrap_or(i64::MAX))))
    .bind(column(rows, |row| row.arrival.message.oversized.map(|whole| whole.sha256.to_vec())))
    .execute(tx)
    .await?;
    Ok(())
}

fn column<'a, T>(rows: &'a [NewReject<'a>], value: impl Fn(&'a NewReject<'a>) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
}

/// The readable facts of a record that is not accepted, kept for searches.
pub(super) struct RejectTraces {
    pub(super) deployment: Option<Uuid>,
    pub(super) event_id: Option<String>,
    pub(super) event_type: Option<String>,
    pub(super) units: Option<u64>,
}

impl RejectTraces {
    pub(super) fn of(arrival: &Arrival) -> Self {
        let read = match &arrival.event {
            Ok(event) => event::Traces::of_event(event),
            Err(_) => event::Traces::of(&arrival.message),
        };
        RejectTraces {
            deployment: read.deployment,
            event_id: read
                .id
                .or_else(|| header_text(&arrival.message, "ce_id"))
                .map(|id| kept(&id, MAX_ID_BYTES)),
            event_type: read
                .event_type
                .or_else(|| header_text(&arrival.message, "ce_type"))
                .map(|event_type| kept(&event_type, 200)),
            units: read.units,
        }
    }
}

/// A header's value as text, for searches, where the record has no valid one.
fn header_text(message: &Message, name: &str) -> Option<String> {
    let (_, value) =
        message.headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name))?;
    Some(String::from_utf8_lossy(value.as_deref()?).into_owned())
}

/// Text that PostgreSQL and its indexes accept, of at most `most` bytes.
fn kept(text: &str, most: usize) -> String {
    let mut text = text.replace('\0', "\u{fffd}");
    text.truncate(text.floor_char_boundary(most));
    text
}
