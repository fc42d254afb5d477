//! Records one batch of one partition in one transaction. New events, conflicts, rejects and held
//! records become rows, duplicates a count. The transaction also queues publications and moves the
//! position.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::confirmed::confirm;
use super::corrections::known_contents;
use super::parts::EVENTS;
use super::positions::{advance, fingerprint};
use super::refused::insert_refused;
use super::{
    Arrival, BatchKind, BatchPart, Chain, Counts, Disposition, LastRecord, PartRow, RecordError,
    Refusal, rows,
};
use crate::event::{Digest, Payload};

/// Records one batch and moves the chain's position to `next_offset`.
pub async fn batch(
    conn: &mut PgConnection,
    chain: &Chain,
    arrivals: &[Arrival],
    next_offset: i64,
    now: DateTime<Utc>,
) -> Result<Counts, RecordError> {
    let mut tx = conn.begin().await?;
    let sources = source_ids(&mut tx, arrivals).await?;
    let batch_id: i64 = sqlx::query("select nextval(pg_get_serial_sequence('batch', 'id'))")
        .fetch_one(&mut *tx)
        .await?
        .try_get(0)?;
    let sorted = SortedEvents::of(arrivals, &sources, now);
    let mut dispositions =
        insert_events(&mut tx, batch_id, &sorted, (arrivals, &sources), now).await?;
    let counts = dispositions.counts(arrivals);
    insert_refused(&mut tx, now, batch_id, chain, arrivals, &dispositions.refused).await?;
    let events = dispositions.events();
    insert_batch(&mut tx, now, batch_id, chain, next_offset, counts, &events).await?;
    match chain {
        Chain::Live(lease) => {
            advance(
                &mut tx,
                now,
                lease,
                next_offset,
                last_record(arrivals),
                i64::from(counts.records),
            )
            .await?
        }
        Chain::Replay { id, next_offset: from, .. } => {
            advance_replay(&mut tx, *id, chain, *from, next_offset).await?
        }
    }
    tx.commit().await?;
    Ok(counts)
}

/// The ledger's ids of the batch's registered deployments, by one query for any number of
/// deployments.
async fn source_ids(
    tx: &mut PgConnection,
    arrivals: &[Arrival],
) -> Result<HashMap<Uuid, i16>, sqlx::Error> {
    let deployments: HashSet<Uuid> = arrivals
        .iter()
        .filter_map(|arrival| arrival.event.as_ref().ok())
        .map(|event| event.deployment)
        .collect();
    let registered: Vec<(Uuid, i16)> =
        sqlx::query_as("select deployment_id, id from source where deployment_id = any($1)")
            .bind(deployments.into_iter().collect::<Vec<_>>())
            .fetch_all(tx)
            .await?;
    Ok(registered.into_iter().collect())
}

/// A batch's events by table, each id once and in order, so that parallel partitions never deadlock
/// on ids.
pub(super) struct SortedEvents<'a> {
    builds: BTreeMap<(i16, Uuid), rows::NewRow<'a>>,
    claims: BTreeMap<(i16, Uuid), rows::NewRow<'a>>,
    usage: BTreeMap<(i16, &'a str), rows::NewRow<'a>>,
    /// Repeated ids within this batch.
    repeated: Vec<RepeatedId<'a>>,
    /// Records of unregistered deployments, by index.
    unregistered: HashMap<usize, Uuid>,
}

/// A repeated id within one batch. It is compared with the accepted event, which may differ from
/// the batch's first event of that id.
struct RepeatedId<'a> {
    new: rows::NewRow<'a>,
    first_index: usize,
    first_digest: Digest,
}

impl<'a> SortedEvents<'a> {
    pub(super) fn of(
        arrivals: &'a [Arrival],
        sources: &HashMap<Uuid, i16>,
        now: DateTime<Utc>,
    ) -> Self {
        let mut sorted = SortedEvents {
            builds: BTreeMap::new(),
            claims: BTreeMap::new(),
            usage: BTreeMap::new(),
            repeated: Vec::new(),
            unregistered: HashMap::new(),
        };
        for (index, arrival) in arrivals.iter().enumerate() {
            let Ok(event) = &arrival.event else { continue };
            let Some(source_id) = sources.get(&event.deployment).copied() else {
                sorted.unregistered.insert(index, event.deployment);
                continue;
            };
            let confirmed_at = arrival.confirmed.then_some(now);
            let new = rows::NewRow {
                index,
                source_id,
                offset: arrival.offset,
                digest: event.digest(),
                event,
                confirmed_at,
            };
            let first = match &event.payload {
                Payload::Build(build) => {
                    sorted.builds.entry((source_id, build.build_id)).or_insert_with(|| new.clone())
                }
                Payload::Claim(claim) => {
                    sorted.claims.entry((source_id, claim.build_id)).or_insert_with(|| new.clone())
                }
                Payload::Usage(usage) => sorted
                    .usage
                    .entry((source_id, usage.id.as_str()))
                    .or_insert_with(|| new.clone()),
            };
            if first.index != index {
                sorted.repeated.push(RepeatedId {
                    first_index: first.index,
                    first_digest: first.digest,
                    new,
                });
            }
        }
        sorted
    }
}

impl<'a> SortedEvents<'a> {
    pub(super) fn tables(
        &self,
    ) -> (Vec<&rows::NewRow<'a>>, Vec<&rows::NewRow<'a>>, Vec<&rows::NewRow<'a>>) {
        (
            self.builds.values().collect(),
            self.claims.values().collect(),
            self.usage.values().collect(),
        )
    }

    /// Sets the disposition of records that the tables cannot judge: repeated ids in the batch, and
    /// unregistered deployments.
    pub(super) fn judge_the_rest(&self, dispositions: &mut Dispositions) {
        for repeated in &self.repeated {
            if repeated.new.digest
                == dispositions
                    .accepted_digests
                    .get(&repeated.first_index)
                    .copied()
                    .unwrap_or(repeated.first_digest)
            {
                dispositions.duplicates.insert(repeated.new.index);
            } else {
                dispositions
                    .refused
                    .insert(repeated.new.index, Refusal::conflict(repeated.new.event));
            }
        }
        dispositions.refused.extend(
            self.unregistered
                .iter()
                .map(|(index, deployment)| (*index, Refusal::unregistered(*deployment))),
        );
    }
}

/// The dispositions according to the tables.
#[derive(Default)]
pub(super) struct Dispositions {
    /// The rows of new events, with their offsets.
    accepted: Vec<(i64, PartRow)>,
    /// Duplicates of accepted events, by the record's index.
    duplicates: HashSet<usize>,
    /// Events that are not accepted, by the record's index.
    refused: HashMap<usize, Refusal>,
    /// The accepted digest of each conflict, by the index of the batch's first event of that id.
    accepted_digests: HashMap<usize, Digest>,
}

impl Dispositions {
    pub(super) fn refused(&self) -> &HashMap<usize, Refusal> {
        &self.refused
    }

    /// Makes duplicates of conflicts whose content their corrected event has or had. Without a
    /// conflict it reads nothing.
    pub(super) async fn admit_known_contents(
        &mut self,
        tx: &mut PgConnection,
        arrivals: &[Arrival],
        sources: &HashMap<Uuid, i16>,
    ) -> Result<(), sqlx::Error> {
        let conflicts = self.refused.iter().filter_map(|(index, refusal)| {
            let event = arrivals.get(*index)?.event.as_ref().ok()?;
            let source_id = sources.get(&event.deployment)?;
            (refusal.disposition == Disposition::Conflict)
                .then(|| (*index, *source_id, event.id(), event.digest()))
        });
        let conflicts: Vec<_> = conflicts.collect();
        if conflicts.is_empty() {
            return Ok(());
        }
        for index in known_contents(tx, &conflicts).await? {
            self.refused.remove(&index);
            self.duplicates.insert(index);
        }
        Ok(())
    }

    /// The batch's part of new events, in the log's order.
    fn events(&mut self) -> BatchPart {
        self.accepted.sort_by_key(|(offset, _)| *offset);
        BatchPart::of(self.accepted.iter().map(|(_, row)| row))
    }

    pub(super) fn counts(&self, arrivals: &[Arrival]) -> Counts {
        let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
        let all_refused = || {
            arrivals
                .iter()
                .filter_map(|arrival| arrival.event.as_ref().err())
                .chain(self.refused.values())
        };
        let refused = |disposition| {
            all_refused().filter(|refusal| refusal.disposition == disposition).count()
        };
        Counts {
            records: count(arrivals.len()),
            accepted: count(self.accepted.len()),
            duplicates: count(self.duplicates.len()),
            conflicts: count(refused(Disposition::Conflict)),
            rejects: count(refused(Disposition::Rejected)),
            held: count(refused(Disposition::Held)),
        }
    }
}

async fn insert_events(
    tx: &mut PgConnection,
    batch_id: i64,
    sorted: &SortedEvents<'_>,
    (arrivals, sources): (&[Arrival], &HashMap<Uuid, i16>),
    now: DateTime<Utc>,
) -> Result<Dispositions, sqlx::Error> {
    let mut dispositions = Dispositions::default();
    let (builds, claims, usage) = sorted.tables();
    judge(&mut dispositions, &builds, &rows::insert_builds(tx, batch_id, &builds).await?);
    judge(&mut dispositions, &claims, &rows::insert_claims(tx, batch_id, &claims).await?);
    judge(&mut dispositions, &usage, &rows::insert_usage(tx, batch_id, &usage, now).await?);
    sorted.judge_the_rest(&mut dispositions);
    dispositions.admit_known_contents(tx, arrivals, sources).await?;
    let sightings = builds
        .into_iter()
        .chain(claims)
        .chain(usage)
        .chain(sorted.repeated.iter().map(|repeated| &repeated.new));
    let duplicates: Vec<&rows::NewRow<'_>> =
        sightings.filter(|new| dispositions.duplicates.contains(&new.index)).collect();
    confirm(tx, &duplicates, now).await?;
    Ok(dispositions)
}

/// `known` has, by index, the accepted digest of each id that was not inserted.
pub(super) fn judge(
    dispositions: &mut Dispositions,
    news: &[&rows::NewRow],
    known: &HashMap<usize, Digest>,
) {
    for new in news {
        match known.get(&new.index) {
            None => dispositions.accepted.push((new.offset, new.part_row())),
            Some(digest) if *digest == new.digest => {
                dispositions.duplicates.insert(new.index);
            }
            Some(digest) => {
                dispositions.refused.insert(new.index, Refusal::conflict(new.event));
                dispositions.accepted_digests.insert(new.index, *digest);
            }
        }
    }
}

/// Inserts the batch's row. Its sequence is null until the commit. There the deferred trigger
/// `batch_takes_sequence` takes the next number from the row of `ledger`, so that sequence order is
/// commit order.
async fn insert_batch(
    tx: &mut PgConnection,
    now: DateTime<Utc>,
    batch_id: i64,
    chain: &Chain,
    next_offset: i64,
    counts: Counts,
    events: &BatchPart,
) -> Result<(), sqlx::Error> {
    let (kind, epoch, replay_id) = match chain {
        Chain::Live(lease) => (BatchKind::Log, Some(lease.epoch), None),
        Chain::Replay { id, .. } => (BatchKind::Replay, None, Some(*id)),
    };
    sqlx::query(
        "with added as (
             insert into batch (id, kind, recorded_at, topic, partition, generation, epoch, replay_id, first_offset, next_offset,
                 records, accepted, duplicates, conflicts, rejects, held)
             overriding system value values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
         )
         insert into batch_part (batch_id, part, rows, sha256, marks) select $1, $17, $18, $19, $20 where $18 > 0",
    )
    .bind(batch_id)
    .bind(kind)
    .bind(now)
    .bind(chain.partition().topic.name())
    .bind(chain.partition().partition)
    .bind(chain.generation())
    .bind(epoch)
    .bind(replay_id)
    .bind(chain.next_offset())
    .bind(next_offset)
    .bind(counts.records)
    .bind(counts.accepted)
    .bind(counts.duplicates)
    .bind(counts.conflicts)
    .bind(counts.rejects)
    .bind(counts.held)
    .bind(EVENTS)
    .bind(events.rows)
    .bind(&events.sha256)
    .bind(&events.marks)
    .execute(tx)
    .await?;
    Ok(())
}

/// Moves by compare-and-set, and only in the planned generation: in another one the offset belongs
/// to another record.
async fn advance_replay(
    tx: &mut PgConnection,
    id: Uuid,
    chain: &Chain,
    from: i64,
    to: i64,
) -> Result<(), RecordError> {
    let partition = chain.partition();
    let moved = sqlx::query(
        "update replay set next_offset = $5 where id = $1 and topic = $2 and partition = $3 and next_offset = $4
             and current_generation($2, $3) = $6",
    )
    .bind(id)
    .bind(partition.topic.name())
    .bind(partition.partition)
    .bind(from)
    .bind(to)
    .bind(chain.generation())
    .execute(tx)
    .await?;
    if moved.rows_affected() == 1 { Ok(()) } else { Err(RecordError::Fenced(partition)) }
}

/// The last record, to identify it later. An unreadable batch is skipped: with a larger limit other
/// records are read there.
#[must_use]
pub fn last_record(arrivals: &[Arrival]) -> Option<LastRecord> {
    let last = arrivals.iter().rfind(|arrival| arrival.message.unreadable_batch().is_none());
    last.map(|arrival| LastRecord {
        offset: arrival.offset,
        fingerprint: fingerprint(&arrival.message),
    })
}
