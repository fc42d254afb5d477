//! Reads the ledger forward, batch by batch in sequence order. A reader keeps a snapshot open for
//! one page at most.

use std::collections::{HashMap, HashSet};

use sqlx::Connection as _;
use sqlx::postgres::PgRow;
use sqlx::{FromRow as _, PgConnection, Row};
use uuid::Uuid;

use super::{corrected, first_starts, known, rows};
use crate::event::{Event, Fact, Payload, PrebuildClaimed, Topic, WorkspaceBuildCompleted};

/// One batch that a fold reads.
#[derive(Clone, Debug)]
pub struct Entry {
    pub sequence: i64,
    /// The batch's facts, in the log's order.
    pub facts: Vec<Fact>,
    /// The stage that an operator rebuilds at this batch. A fold of rows read before this batch was
    /// committed restarts from zero.
    pub rebuilt: Option<String>,
}

/// A page ends once it has this many events, which limits a fold's memory.
const PAGE_EVENTS: i64 = 20_000;
/// Maximum number of batches in a page.
const PAGE_BATCHES: i64 = 500;

/// A page of the batches after `sequence`, in order; empty at the end. Events and first starts are
/// as corrected up to the sequence `corrected_to`; 0: as accepted.
pub async fn after(
    conn: &mut PgConnection,
    sequence: i64,
    limit: i64,
    corrected_to: i64,
) -> Result<Vec<Entry>, sqlx::Error> {
    // One snapshot covers all statements, so that a batch is read with all its rows.
    let mut tx = conn.begin_with("begin isolation level repeatable read read only").await?;
    let page = page(&mut tx, sequence, limit).await?;
    let ids: Vec<i64> = page.iter().map(|(id, _)| *id).collect();
    let (mut facts, mut rebuilt) =
        (facts(&mut tx, &ids, corrected_to).await?, rebuilt(&mut tx, &ids).await?);
    tx.commit().await?;
    facts.sort_by_key(|fact| fact.order);
    let mut by_batch: HashMap<i64, Vec<Fact>> = HashMap::new();
    for found in facts {
        by_batch.entry(found.batch_id).or_default().push(found.fact);
    }
    let entry = |(id, sequence)| Entry {
        sequence,
        facts: by_batch.remove(&id).unwrap_or_default(),
        rebuilt: rebuilt.remove(&id),
    };
    Ok(page.into_iter().map(entry).collect())
}

async fn page(
    tx: &mut PgConnection,
    sequence: i64,
    limit: i64,
) -> Result<Vec<(i64, i64)>, sqlx::Error> {
    sqlx::query_as(
        "select id, sequence from (
             select id, sequence, sum(accepted) over (order by sequence) - accepted as before
             from (select id, sequence, accepted from batch where sequence > $1 and sequence <= $2 order by sequence limit $3) as next
         ) as counted where before < $4 order by sequence",
    )
    .bind(sequence)
    .bind(limit)
    .bind(PAGE_BATCHES)
    .bind(PAGE_EVENTS)
    .fetch_all(tx)
    .await
}

struct OrderedFact {
    batch_id: i64,
    /// The log's offset, or a small number for a fact that does not come from the log.
    order: i64,
    fact: Fact,
}

async fn facts(
    tx: &mut PgConnection,
    ids: &[i64],
    corrected_to: i64,
) -> Result<Vec<OrderedFact>, sqlx::Error> {
    let mut found = Vec::new();
    let mut corrections = Corrections::read(tx, ids, corrected_to).await?;
    let builds = "select e.*, s.deployment_id, coalesce(f.build_id = e.build_id, false) as has_first_start
         from workspace_build e join source s on s.id = e.source_id
             left join workspace_first_start f
                 on e.first_successful_start and f.source_id = e.source_id and f.workspace_id = e.workspace_id
         where e.batch_id = any($1)";
    let claims = "select e.*, s.deployment_id from prebuild_claim e join source s on s.id = e.source_id where e.batch_id = any($1)";
    let usage = "select e.source_id, e.batch_id, e.log_offset, e.id, e.event_type, e.quantity::text as quantity, e.created_at, e.publish_started_at,
             e.published_at, e.failure_message, s.deployment_id
         from usage_event e join source s on s.id = e.source_id where e.batch_id = any($1)";
    for (topic, query) in [
        (Topic::WorkspaceBuilds, builds),
        (Topic::PrebuildClaims, claims),
        (Topic::AgentUsage, usage),
    ] {
        let rows = sqlx::query(query).bind(ids).fetch_all(&mut *tx).await?;
        if topic == Topic::WorkspaceBuilds {
            corrections.read_first_starts(tx, &rows, corrected_to).await?;
        }
        for row in &rows {
            let event = Event {
                deployment: row.try_get("deployment_id")?,
                payload: payload_of(topic, row)?,
            };
            let Some(event) = (match corrections.is_empty() {
                true => Some(as_accepted(row, event)?),
                false => corrections.apply(tx, row, event).await?,
            }) else {
                continue;
            };
            found.push(OrderedFact {
                batch_id: row.try_get("batch_id")?,
                order: row.try_get("log_offset")?,
                fact: Fact::Event(event),
            });
        }
    }
    introductions(tx, ids, &mut found).await?;
    licenses(tx, ids, &mut found).await?;
    let corrections = corrected::facts(tx, ids).await?;
    found.extend((0..).zip(corrections).map(|(order, (batch_id, fact))| OrderedFact {
        batch_id,
        order,
        fact,
    }));
    Ok(found)
}

/// The event of a row, with `first_successful_start` only for the build that is kept as one.
fn as_accepted(row: &PgRow, mut event: Event) -> Result<Event, sqlx::Error> {
    if let Payload::Build(build) = &mut event.payload {
        build.first_successful_start &= row.try_get::<bool, _>("has_first_start")?;
    }
    Ok(event)
}

/// The changes of a page's events by corrections: normally none.
struct Corrections {
    events: HashMap<(i16, String), Option<Event>>,
    first_starts: HashMap<(i16, Uuid), Option<Uuid>>,
}

impl Corrections {
    async fn read(tx: &mut PgConnection, ids: &[i64], at: i64) -> Result<Self, sqlx::Error> {
        let events = match at {
            0 => HashMap::new(),
            _ => corrected::of_batches(tx, ids, at).await?,
        };
        Ok(Corrections { events, first_starts: HashMap::new() })
    }

    /// Reads the first starts at the sequence `at` of the workspaces of these builds that a later
    /// correction has changed.
    async fn read_first_starts(
        &mut self,
        tx: &mut PgConnection,
        builds: &[PgRow],
        at: i64,
    ) -> Result<(), sqlx::Error> {
        if builds.is_empty() || !first_starts::have_changed(tx, at).await? {
            return Ok(());
        }
        let mut workspaces = HashSet::new();
        for row in builds {
            if row.try_get("first_successful_start")? {
                workspaces.insert((row.try_get("source_id")?, row.try_get("workspace_id")?));
            }
        }
        for ((source_id, _), event) in &self.events {
            if let Some(Event { payload: Payload::Build(build), .. }) = event
                && build.first_successful_start
            {
                workspaces.insert((*source_id, build.workspace_id));
            }
        }
        self.first_starts = first_starts::before_changes(tx, at, &workspaces).await?;
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.first_starts.is_empty()
    }

    /// The event of a row with its corrected content, and with the first start of that time. None:
    /// corrected to nothing.
    async fn apply(
        &self,
        tx: &mut PgConnection,
        row: &PgRow,
        mut event: Event,
    ) -> Result<Option<Event>, sqlx::Error> {
        let source_id: i16 = row.try_get("source_id")?;
        let mut is_corrected = false;
        if let Some(content) = self.events.get(&(source_id, event.id())) {
            let Some(content) = content else { return Ok(None) };
            (event, is_corrected) = (content.clone(), true);
        }
        if let Payload::Build(build) = &mut event.payload
            && build.first_successful_start
        {
            let (workspace_id, build_id) = (build.workspace_id, Some(build.build_id));
            build.first_successful_start = match self.first_starts.get(&(source_id, workspace_id)) {
                Some(first) => *first == build_id,
                None if is_corrected => {
                    known::first_start(tx, source_id, workspace_id).await? == build_id
                }
                None => row.try_get("has_first_start")?,
            };
        }
        Ok(Some(event))
    }
}

/// The payload of a row of the topic's table. The query must select a quantity as `quantity::text`.
pub(super) fn payload_of(topic: Topic, row: &PgRow) -> Result<Payload, sqlx::Error> {
    Ok(match topic {
        Topic::WorkspaceBuilds => Payload::Build(Box::new(WorkspaceBuildCompleted::from_row(row)?)),
        Topic::PrebuildClaims => Payload::Claim(Box::new(PrebuildClaimed::from_row(row)?)),
        Topic::AgentUsage => Payload::Usage(rows::usage_of(row)?),
    })
}

async fn introductions(
    tx: &mut PgConnection,
    ids: &[i64],
    found: &mut Vec<OrderedFact>,
) -> Result<(), sqlx::Error> {
    let sources = sqlx::query(
        "select batch_id, deployment_id, introduced_at from source where batch_id = any($1)",
    )
    .bind(ids);
    for row in &sources.fetch_all(&mut *tx).await? {
        let fact = Fact::Introduced { deployment: row.try_get(1)?, introduced_at: row.try_get(2)? };
        found.push(OrderedFact { batch_id: row.try_get(0)?, order: 0, fact });
    }
    let baselines = sqlx::query(
        "select b.batch_id, s.deployment_id, b.organization_name, b.template_name, b.preset_name, b.creations
         from creation_baseline b join source s on s.id = b.source_id where b.batch_id = any($1)
         order by b.organization_name, b.template_name, b.preset_name",
    )
    .bind(ids);
    for row in &baselines.fetch_all(tx).await? {
        let series = [row.try_get(2)?, row.try_get(3)?, row.try_get(4)?];
        let creations = u64::try_from(row.try_get::<i64, _>(5)?)
            .map_err(|error| sqlx::Error::Decode(error.into()))?;
        let fact = Fact::Baseline { deployment: row.try_get(1)?, series, creations };
        found.push(OrderedFact { batch_id: row.try_get(0)?, order: 1, fact });
    }
    Ok(())
}

async fn rebuilt(tx: &mut PgConnection, ids: &[i64]) -> Result<HashMap<i64, String>, sqlx::Error> {
    let acts = sqlx::query_as(
        "select batch_id, subject from operator_act where act = 'rebuild' and batch_id = any($1)",
    )
    .bind(ids);
    Ok(acts.fetch_all(tx).await?.into_iter().collect())
}

async fn licenses(
    tx: &mut PgConnection,
    ids: &[i64],
    found: &mut Vec<OrderedFact>,
) -> Result<(), sqlx::Error> {
    let licenses = sqlx::query(
        "select l.batch_id, s.deployment_id, l.license_id, l.jwt_sha256, l.present, l.claims
         from license l join source s on s.id = l.source_id where l.batch_id = any($1) order by l.license_id, l.jwt_sha256",
    )
    .bind(ids);
    for row in &licenses.fetch_all(tx).await? {
        let license_id: i32 = row.try_get(2)?;
        let fact = Fact::License {
            deployment: row.try_get(1)?,
            license_id,
            jwt_sha256: row.try_get(3)?,
            present: row.try_get(4)?,
            claims: row.try_get(5)?,
        };
        found.push(OrderedFact { batch_id: row.try_get(0)?, order: i64::from(license_id), fact });
    }
    Ok(())
}
