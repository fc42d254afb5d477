//! Corrections of accepted events: an operator sets an event to coderd's row. The accepted row
//! stays; the newest correction up to a sequence is the event's content at that sequence.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, FromRow, PgConnection};
use uuid::Uuid;

use super::first_starts::CorrectedEvent;
use super::publications::lock;
use super::slices::{self, Presence};
use super::{Act, ActFilter, ActKind, NewAct, PublicationState, Sequence, acts, first_starts};
use crate::event::{Event, Payload, Topic};

/// A correction to write.
#[derive(Clone, Debug)]
pub struct NewCorrection {
    pub event_id: String,
    pub topic: Topic,
    /// The build of a build or claim.
    pub build_id: Option<Uuid>,
    /// The batch that accepted the event.
    pub accepted_batch_id: i64,
    /// The event until now; none: it was corrected to nothing.
    pub before: Option<Event>,
    /// The event from now on; none: coderd does not have it.
    pub after: Option<Event>,
    /// The publication as it was when planned; only of usage.
    pub publication: Option<PublicationNow>,
}

impl NewCorrection {
    pub fn corrected(&self) -> CorrectedEvent<'_> {
        let NewCorrection { before, after, accepted_batch_id, .. } = self;
        CorrectedEvent {
            before: before.as_ref(),
            after: after.as_ref(),
            accepted_batch_id: *accepted_batch_id,
        }
    }
}

/// A publication, as far as a correction depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct PublicationNow {
    pub state: PublicationState,
    /// Whether the vendor may have accepted an attempt whose answer is not recorded.
    pub unanswered: bool,
}

impl PublicationNow {
    /// The state after a correction. An event that coderd does not have leaves the queue. A vendor
    /// that may have accepted it leaves the state unknown. An event that coderd has with other
    /// content returns to the queue if the vendor does not have it. The publisher decides whether it
    /// is too old.
    #[must_use]
    pub fn state_after(self, is_gone: bool) -> PublicationState {
        match (self.state, is_gone) {
            (PublicationState::Pending, true) if self.unanswered => PublicationState::Unknown,
            (PublicationState::Pending, true) => PublicationState::Withdrawn,
            (
                PublicationState::Withdrawn | PublicationState::Expired | PublicationState::Refused,
                false,
            ) => PublicationState::Pending,
            (state, _) => state,
        }
    }
}

/// The result of writing corrections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Correction {
    /// They are written; the ledger sequence of the act.
    Done(Sequence),
    /// A publisher has leased one of the publications: a request may be in flight.
    InFlight(String),
    /// An event or a publication is not as it was when planned.
    Changed,
}

/// The first of these events that a publisher has leased: a request with it may be in flight. Of all
/// deployments, or of one.
pub async fn in_flight(
    conn: &mut PgConnection,
    deployment_id: Option<Uuid>,
    ids: &[String],
) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select event_id from source join publication on source_id = source.id
         where ($1 is null or deployment_id = $1) and event_id = any($2) and state = 'pending' and leased_until > clock_timestamp()
         order by event_id limit 1",
    )
    .bind(deployment_id)
    .bind(ids)
    .fetch_optional(conn)
    .await
}

/// The act that executed this plan, if it made the current content of all its events.
pub async fn executed(
    conn: &mut PgConnection,
    hash: &str,
    ids: &[String],
) -> Result<Option<Act>, sqlx::Error> {
    let filter = ActFilter {
        act: Some(ActKind::Correct),
        subject: Some(hash.to_owned()),
        ..ActFilter::default()
    };
    let Some(act) = acts::list(conn, &filter, 1).await?.pop() else { return Ok(None) };
    let current: Vec<String> = sqlx::query_scalar(
        "select event_id from correction c where act_id = $1
             and batch_id = (select batch_id from newest_correction(c.source_id, c.event_id)) order by event_id collate \"C\"",
    )
    .bind(act.id)
    .fetch_all(conn)
    .await?;
    Ok((current == ids).then_some(act))
}

/// Writes the corrections of one source as one batch, with the state of their publications and the
/// first starts of their workspaces. Writes nothing unless everything is as it was planned.
///
/// A few statements for any number of events, which read and write rows by key.
pub async fn record(
    conn: &mut PgConnection,
    source_id: i16,
    corrections: &[NewCorrection],
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<Correction, sqlx::Error> {
    let mut tx = conn.begin().await?;
    // one correction at a time: batch ids are in their order
    sqlx::query("lock table correction in share row exclusive mode").execute(&mut *tx).await?;
    let ids: Vec<String> = corrections.iter().map(|one| one.event_id.clone()).collect();
    lock(&mut tx, source_id, &ids).await?;
    let leased: Option<String> = sqlx::query_scalar(
        "select event_id from publication where source_id = $1 and event_id = any($2) and state = 'pending'
             and leased_until > clock_timestamp() order by event_id limit 1",
    )
    .bind(source_id)
    .bind(&ids)
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(event_id) = leased {
        return Ok(Correction::InFlight(event_id));
    }
    let newest = newest(&mut tx, source_id, &ids).await?;
    let publications = publications(&mut tx, source_id, &ids).await?;
    let is_as_planned = |one: &NewCorrection| {
        newest.get(&one.event_id).is_none_or(|newest| *newest == one.before)
            && publications.get(&one.event_id) == one.publication.as_ref()
    };
    if !corrections.iter().all(is_as_planned) {
        return Ok(Correction::Changed);
    }
    let act_id = acts::insert(&mut tx, act, now).await?;
    let batch_id: i64 = sqlx::query_scalar("select batch_id from operator_act where id = $1")
        .bind(act_id)
        .fetch_one(&mut *tx)
        .await?;
    insert(&mut tx, source_id, corrections, batch_id, act_id).await?;
    settle(&mut tx, source_id, corrections, batch_id, now).await?;
    let events: Vec<_> = corrections.iter().map(NewCorrection::corrected).collect();
    first_starts::follow(&mut tx, source_id, &events, batch_id).await?;
    // after the first starts, as a consumer's batch: the two never deadlock
    unmark(&mut tx, source_id, corrections, now).await?;
    tx.commit().await?;
    let query = "select named_sequence(sequence) from batch where id = $1";
    Ok(Correction::Done(sqlx::query_scalar(query).bind(batch_id).fetch_one(conn).await?))
}

async fn insert(
    tx: &mut PgConnection,
    source_id: i16,
    corrections: &[NewCorrection],
    batch_id: i64,
    act_id: i64,
) -> Result<(), sqlx::Error> {
    fn column<'a, T>(all: &'a [NewCorrection], of: impl Fn(&'a NewCorrection) -> T) -> Vec<T> {
        all.iter().map(of).collect()
    }
    let usage = |one: &NewCorrection| match one.after.as_ref().map(|event| &event.payload) {
        Some(Payload::Usage(usage)) => Some(usage.quantity),
        _ => None,
    };
    sqlx::query(
        "insert into correction (source_id, batch_id, act_id, event_id, topic, build_id, accepted_batch_id, before_event, before_digest,
             after_event, digest, event_time, event_type, quantity, unanswered)
         select $1, $2, $3, event_id, topic, build_id, accepted_batch_id, before_event, before_digest, after_event, digest, event_time,
             event_type, quantity::numeric, unanswered
         from unnest($4::text[], $5::text[], $6::uuid[], $7::bigint[], $8::jsonb[], $9::bytea[], $10::jsonb[], $11::bytea[], $12::timestamptz[],
                 $13::text[], $14::text[], $15::boolean[])
             as new (event_id, topic, build_id, accepted_batch_id, before_event, before_digest, after_event, digest, event_time, event_type,
                 quantity, unanswered)",
    )
    .bind(source_id)
    .bind(batch_id)
    .bind(act_id)
    .bind(column(corrections, |one| one.event_id.as_str()))
    .bind(column(corrections, |one| one.topic.name()))
    .bind(column(corrections, |one| one.build_id))
    .bind(column(corrections, |one| one.accepted_batch_id))
    .bind(column(corrections, |one| one.before.as_ref().map(Event::to_structured)))
    .bind(column(corrections, |one| digest_of(&one.before)))
    .bind(column(corrections, |one| one.after.as_ref().map(Event::to_structured)))
    .bind(column(corrections, |one| digest_of(&one.after)))
    .bind(column(corrections, |one| one.after.as_ref().map(Event::time)))
    .bind(column(corrections, |one| usage(one).map(|usage| usage.usage_type().as_str())))
    .bind(column(corrections, |one| usage(one).map(|usage| usage.number().to_string())))
    .bind(column(corrections, |one| one.publication.is_some_and(|now| now.unanswered)))
    .execute(tx)
    .await?;
    Ok(())
}

/// The events are as in coderd from now on, so that none of them is gone there.
async fn unmark(
    tx: &mut PgConnection,
    source_id: i16,
    corrections: &[NewCorrection],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    for topic in Topic::ALL {
        let of_topic = corrections.iter().filter(|one| one.topic == topic);
        let key = |one: &NewCorrection| match one.build_id {
            Some(build_id) => build_id.to_string(),
            None => one.event_id.clone(),
        };
        let keys: Vec<String> = of_topic.map(key).collect();
        slices::mark(tx, topic, source_id, &keys, Presence::Back, now).await?;
    }
    Ok(())
}

fn digest_of(event: &Option<Event>) -> Option<Vec<u8>> {
    event.as_ref().map(|event| event.digest().to_vec())
}

/// Moves the publications. One that remains pending is due at once, with its corrected time.
async fn settle(
    tx: &mut PgConnection,
    source_id: i16,
    corrections: &[NewCorrection],
    batch_id: i64,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let (mut ids, mut states, mut times, mut settled) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for one in corrections {
        let Some(publication) = one.publication else { continue };
        let state = publication.state_after(one.after.is_none());
        settled.extend((state != publication.state).then_some((one.event_id.as_str(), state)));
        ids.push(one.event_id.as_str());
        states.push(state);
        times.push(one.after.as_ref().map(Event::time));
    }
    sqlx::query(
        "update publication set state = new.state, event_created_at = coalesce(new.created_at, event_created_at), held_for = null,
             held_since = null, leased_by = null, leased_until = null, next_attempt_at = case when new.state = 'pending' then $5 else next_attempt_at end
         from unnest($2::text[], $3::text[], $4::timestamptz[]) as new (event_id, state, created_at)
         where publication.source_id = $1 and publication.event_id = new.event_id",
    )
    .bind(source_id)
    .bind(ids)
    .bind(states)
    .bind(times)
    .bind(now)
    .execute(&mut *tx)
    .await?;
    let (ids, states): (Vec<&str>, Vec<PublicationState>) = settled.into_iter().unzip();
    sqlx::query("update batch set settled = $2 where id = $1")
        .bind(batch_id)
        .bind(i32::try_from(ids.len()).unwrap_or(i32::MAX))
        .execute(&mut *tx)
        .await?;
    sqlx::query("insert into settlement (source_id, event_id, batch_id, state) select $1, event_id, $2, state from unnest($3::text[], $4::text[]) as new (event_id, state)")
        .bind(source_id)
        .bind(batch_id)
        .bind(ids)
        .bind(states)
        .execute(tx)
        .await?;
    Ok(())
}

/// The newest content of these events that were corrected; none: corrected to nothing. Events
/// without a correction are left out.
pub async fn newest(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<HashMap<String, Option<Event>>, sqlx::Error> {
    let rows: Vec<(String, Option<serde_json::Value>)> = sqlx::query_as(
        "select event_id, after_event from unnest($2::text[]) as asked (id) cross join lateral newest_correction($1, asked.id)",
    )
    .bind(source_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|(id, event)| Ok((id, event.as_ref().map(event_of).transpose()?)))
        .collect()
}

/// The publications of these events.
pub async fn publications(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<HashMap<String, PublicationNow>, sqlx::Error> {
    #[derive(FromRow)]
    struct Row {
        event_id: String,
        #[sqlx(flatten)]
        publication: PublicationNow,
    }
    let rows: Vec<Row> = sqlx::query_as(
        "select event_id, state, unanswered from publication where source_id = $1 and event_id = any($2)",
    )
    .bind(source_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.event_id, row.publication)).collect())
}

/// The type and quantity that the vendor bills of these published events: of the content that was
/// sent. Reads a few rows by key for each event.
pub async fn billed(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<HashMap<String, (String, String)>, sqlx::Error> {
    let rows: Vec<(String, String, String)> = sqlx::query_as(
        "select usage.id, coalesce(sent.event_type, usage.event_type), coalesce(sent.quantity, usage.quantity)::text
         from settlement s join usage_event usage on usage.source_id = s.source_id and usage.id = s.event_id
             left join correction sent on (sent.source_id, sent.event_id, sent.batch_id) = (s.source_id, s.event_id, s.content_batch_id)
         where s.source_id = $1 and s.event_id = any($2) and s.state = 'published'",
    )
    .bind(source_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|(id, event_type, quantity)| (id, (event_type, quantity))).collect())
}

/// The records among these, by index, whose content their event has or had. Such a record is a
/// duplicate: a correction decides the event, and no record of the log brings an earlier content
/// back. `records` are source, event id and digest.
pub(super) async fn known_contents(
    conn: &mut PgConnection,
    records: &[(usize, i16, String, [u8; 32])],
) -> Result<HashSet<usize>, sqlx::Error> {
    let rows: Vec<i64> = sqlx::query_scalar(
        "select index from unnest($1::bigint[], $2::smallint[], $3::text[], $4::bytea[]) as record (index, source_id, event_id, digest)
         where exists (select from correction c where c.source_id = record.source_id and c.event_id = record.event_id
             and record.digest in (c.before_digest, c.digest))",
    )
    .bind(records.iter().map(|(index, ..)| *index as i64).collect::<Vec<_>>())
    .bind(records.iter().map(|(_, source_id, ..)| *source_id).collect::<Vec<_>>())
    .bind(records.iter().map(|(_, _, id, _)| id.as_str()).collect::<Vec<_>>())
    .bind(records.iter().map(|(.., digest)| digest.to_vec()).collect::<Vec<_>>())
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().filter_map(|index| usize::try_from(index).ok()).collect())
}

/// The event in a column.
pub(super) fn event_of(column: &serde_json::Value) -> Result<Event, sqlx::Error> {
    Event::from_structured(column).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}
