//! The audit's questions to the ledger: rows on both sides of each joint, counted and compared page
//! by page.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::checks::{
    self, BatchCursor, ChainName, ChainSums, CheckRequest, PositionBooks, PublicationKey,
};
use super::{AuditItem, Difference, LastRecord, Sequence, audit_items};
use crate::event::TopicPartition;

/// One partition according to the ledger's own rows.
#[derive(Clone, Debug)]
pub struct PartitionBooks {
    pub partition: TopicPartition,
    /// The partition's position.
    pub next_offset: i64,
    /// The last record before the position.
    pub last: Option<LastRecord>,
    /// Records read. The counts are the sums over the live chain's batches.
    pub records: i64,
    pub accepted: i64,
    pub duplicates: i64,
    /// Records in conflict with an accepted event.
    pub conflicts: i64,
    pub rejects: i64,
    pub held: i64,
}

/// The sums and differences inside the ledger.
#[derive(Clone, Debug)]
pub struct LedgerBooks {
    /// The last sequence that was read.
    pub sequence: Sequence,
    pub partitions: Vec<PartitionBooks>,
    /// The number of accepted usage events.
    pub usage: i64,
    /// The number of publications by state.
    pub publications: BTreeMap<String, i64>,
    /// Differences of chains, counts, sequences and publications.
    pub differences: Vec<Difference>,
}

/// Maximum number of listed differences of each kind.
const LISTED: usize = 1_000;

/// The sums and differences of all batches, as far as they are read. An interrupted reading can go
/// on from it.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Reading {
    /// How far publications are read: by batch, then by key.
    vendor: BatchCursor,
    vendor_is_read: bool,
    keys: Option<PublicationKey>,
    /// How far batches with their events are read. They are read last, with the positions.
    log: BatchCursor,
    chains: BTreeMap<ChainName, ChainSums>,
    usage: i64,
    publications: BTreeMap<String, i64>,
    differences: BTreeMap<String, BTreeSet<Difference>>,
    /// Differences of earlier parts of an interrupted reading: judged again at the end.
    #[serde(default)]
    kept: Vec<Difference>,
}

/// Builds that one statement reads.
const BUILDS: i64 = 20_000;
/// Kept differences that one statement judges.
const JUDGED: usize = 1_000;

impl Reading {
    /// Reads the next page. Returns the books after the last one. A page costs the same at any size
    /// of the ledger.
    pub async fn read(
        &mut self,
        conn: &mut PgConnection,
    ) -> Result<Option<LedgerBooks>, sqlx::Error> {
        if self.vendor_is_read && self.keys.is_none() {
            return self.read_log(conn).await;
        }
        let request = CheckRequest {
            audited: self.vendor,
            keys: self.keys.clone(),
            ..CheckRequest::default()
        };
        let checked = checks::vendor_joint(conn, &request).await?;
        self.vendor = checked.new.until;
        self.usage += checked.new.usage;
        self.add(checked.new.differences);
        if let Some(page) = checked.keys {
            for (state, count) in page.states {
                *self.publications.entry(state).or_default() += count;
            }
            self.add(page.differences);
            self.keys = page.until;
        } else if checked.new.is_last {
            self.keys = Some(PublicationKey::default());
        }
        self.vendor_is_read = checked.new.is_last;
        Ok(None)
    }

    async fn read_log(
        &mut self,
        conn: &mut PgConnection,
    ) -> Result<Option<LedgerBooks>, sqlx::Error> {
        let request = CheckRequest { audited: self.log, ..CheckRequest::default() };
        let checked = checks::log_joint(conn, &request).await?;
        self.log = checked.new.until;
        for (chain, sums) in checked.new.chains {
            *self.chains.entry(chain).or_default() += sums;
        }
        self.add(checked.new.differences);
        if !checked.new.is_last {
            return Ok(None);
        }
        self.add(checked.known);
        self.judge_kept(conn).await?;
        let partitions: Vec<PartitionBooks> =
            checked.positions.iter().map(|position| self.partition(position)).collect();
        let off = checked.positions.iter().zip(&partitions);
        let off: Vec<Difference> =
            off.filter_map(|(position, books)| position.difference(books.records)).collect();
        self.add(off);
        Ok(Some(LedgerBooks {
            sequence: checked.sequence,
            partitions,
            usage: self.usage,
            publications: self.publications.clone(),
            differences: self.differences.values().flatten().cloned().collect(),
        }))
    }

    /// Judges the differences from before an interruption again: they may have ended.
    async fn judge_kept(&mut self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        let kept: Vec<AuditItem> =
            std::mem::take(&mut self.kept).into_iter().map(AuditItem::difference).collect();
        for known in kept.chunks(JUDGED) {
            let request = CheckRequest { audited: self.log, known, ..CheckRequest::default() };
            self.add(checks::log_joint(conn, &request).await?.known);
            let request = CheckRequest { audited: self.vendor, known, ..CheckRequest::default() };
            self.add(checks::vendor_joint(conn, &request).await?.known);
        }
        Ok(())
    }

    /// Goes on after an interruption.
    fn resumed(mut self) -> Self {
        self.kept.extend(std::mem::take(&mut self.differences).into_values().flatten());
        self
    }

    /// Batches read so far; each is read twice.
    #[must_use]
    pub fn batches(&self) -> i64 {
        self.vendor.sequence + self.log.sequence
    }

    fn add(&mut self, found: Vec<Difference>) {
        for difference in found {
            let listed = self.differences.entry(difference.kind.to_string()).or_default();
            if listed.len() < LISTED {
                listed.insert(difference);
            }
        }
    }

    fn partition(&self, position: &PositionBooks) -> PartitionBooks {
        let sums = self.chains.get(&position.chain()).copied().unwrap_or_default();
        PartitionBooks {
            partition: position.partition,
            next_offset: position.next_offset,
            last: position.last,
            records: sums.records,
            accepted: sums.accepted,
            duplicates: sums.duplicates,
            conflicts: sums.conflicts,
            rejects: sums.rejects,
            held: sums.held,
        }
    }
}

/// The name of the whole audit among the joints' progress.
const WHOLE: &str = "whole audit";
/// Its source part.
const WHOLE_SOURCE: &str = "whole audit of the source";

/// The place of an audit that was interrupted since then.
pub async fn saved(
    conn: &mut PgConnection,
    since: DateTime<Utc>,
) -> Result<Option<Reading>, sqlx::Error> {
    let saved = audit_items::progress(conn, WHOLE, None).await?;
    let saved: Option<(DateTime<Utc>, Reading)> =
        saved.and_then(|saved| serde_json::from_value(saved).ok());
    Ok(saved.filter(|(at, _)| *at >= since).map(|(_, reading)| reading.resumed()))
}

/// Saves an audit's place.
pub async fn save(
    conn: &mut PgConnection,
    reading: &Reading,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    audit_items::save_progress(conn, WHOLE, None, &serde_json::json!([now, reading])).await
}

/// The place of an audit of this source that was interrupted since then.
pub async fn saved_source(
    conn: &mut PgConnection,
    deployment: Uuid,
    since: DateTime<Utc>,
) -> Result<Option<serde_json::Value>, sqlx::Error> {
    let saved = audit_items::progress(conn, WHOLE_SOURCE, Some(deployment)).await?;
    let saved: Option<(DateTime<Utc>, serde_json::Value)> =
        saved.and_then(|saved| serde_json::from_value(saved).ok());
    Ok(saved.filter(|(at, _)| *at >= since).map(|(_, place)| place))
}

/// Saves the place of an audit of this source.
pub async fn save_source(
    conn: &mut PgConnection,
    deployment: Uuid,
    place: &serde_json::Value,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let progress = serde_json::json!([now, place]);
    audit_items::save_progress(conn, WHOLE_SOURCE, Some(deployment), &progress).await
}

/// Deletes the places of an audit that has ended.
pub async fn forget(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("delete from audit_progress where joint = any($1)")
        .bind([WHOLE, WHOLE_SOURCE])
        .execute(conn)
        .await?;
    Ok(())
}

/// Adds up the ledger's rows and compares them with each other, page by page.
pub async fn add_up(conn: &mut PgConnection) -> Result<LedgerBooks, sqlx::Error> {
    let mut reading = Reading::default();
    loop {
        if let Some(books) = reading.read(conn).await? {
            return Ok(books);
        }
    }
}

/// Builds that the source calls the first successful start of a workspace which has another one, at
/// most `limit`. After coderd has removed old builds, it names the first remaining build. Each
/// difference contains the first start that the ledger has. Reads all builds of the source from the
/// newest on, in statements of 20,000.
pub async fn second_first_starts(
    conn: &mut PgConnection,
    source_id: i16,
    limit: usize,
) -> Result<Vec<Difference>, sqlx::Error> {
    let mut found = Vec::new();
    let mut before: Option<(DateTime<Utc>, Uuid)> = None;
    loop {
        let rows: Vec<(DateTime<Utc>, Uuid, Option<String>)> = sqlx::query_as(
            "with page as materialized (
                 select build_id, workspace_id, completed_at, first_successful_start from workspace_build
                 where source_id = $1 and completed_at <= coalesce($2, 'infinity') and ($2 is null or (completed_at, build_id) < ($2, $3))
                 order by completed_at desc, build_id desc limit $4
             ), second as (
                 select b.completed_at, b.build_id, 'not counted as a creation: workspace ' || b.workspace_id
                     || coalesce(' had its first successful start in build ' || f.build_id, ' was started before the baseline') as detail
                 from page b cross join lateral (select build_id from workspace_first_start f
                     where f.source_id = $1 and f.workspace_id = b.workspace_id) f
                 where b.first_successful_start and b.build_id is distinct from f.build_id and not exists (select from correction c
                     where c.source_id = $1 and c.event_id = 'workspace_build_completed:' || b.build_id)
             )
             select completed_at, build_id, detail from second
             union all
             (select completed_at, build_id, null from page order by completed_at, build_id limit 1)
             order by completed_at desc, build_id desc, detail nulls last",
        )
        .bind(source_id)
        .bind(before.map(|(at, _)| at))
        .bind(before.map(|(_, build_id)| build_id))
        .bind(BUILDS)
        .fetch_all(&mut *conn)
        .await?;
        let Some((at, build_id, _)) = rows.last() else { return Ok(found) };
        before = Some((*at, *build_id));
        for (_, build_id, detail) in rows {
            let Some(detail) = detail else { continue };
            if found.len() == limit {
                return Ok(found);
            }
            let id = format!("workspace_build_completed:{build_id}");
            found.push(Difference { kind: "second_first_start".into(), id, detail });
        }
    }
}

/// A page of the build ids of the source's accepted builds and claims that follow `after`, in
/// order.
pub async fn build_ids(
    conn: &mut PgConnection,
    source_id: i16,
    after: Uuid,
    limit: i64,
) -> Result<Vec<Uuid>, sqlx::Error> {
    let query = "select build_id from (
            (select build_id from workspace_build where source_id = $1 and build_id > $2 order by build_id limit $3)
            union (select build_id from prebuild_claim where source_id = $1 and build_id > $2 order by build_id limit $3)
        ) as ids order by build_id limit $3";
    sqlx::query_scalar(query).bind(source_id).bind(after).bind(limit).fetch_all(conn).await
}

/// The number of the source's usage events that happened at or after `since` and before `until`.
pub async fn usage_between(
    conn: &mut PgConnection,
    source_id: i16,
    since: DateTime<Utc>,
    until: Option<DateTime<Utc>>,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select count(*) from usage_as_of(9223372036854775807)
         where source_id = $1 and created_at >= $2 and created_at < coalesce($3, 'infinity')",
    )
    .bind(source_id)
    .bind(since)
    .bind(until)
    .fetch_one(conn)
    .await
}

/// These of the usage events that happened at or after `since`.
pub async fn recent_usage_of(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
    since: DateTime<Utc>,
) -> Result<Vec<String>, sqlx::Error> {
    let query = "select id from usage_as_of(9223372036854775807) where source_id = $1 and id = any($2) and created_at >= $3";
    sqlx::query_scalar(query).bind(source_id).bind(ids).bind(since).fetch_all(conn).await
}

/// A page of the source's accepted usage ids that follow `after`, in order.
pub async fn usage_ids(
    conn: &mut PgConnection,
    source_id: i16,
    after: &str,
    limit: i64,
) -> Result<Vec<String>, sqlx::Error> {
    let query = "select id from usage_event where source_id = $1 and id > $2 order by id limit $3";
    sqlx::query_scalar(query).bind(source_id).bind(after).bind(limit).fetch_all(conn).await
}

/// Whether the ledger has a pass of the source that began after `pass_id` was recorded. The first
/// later pass may have begun before.
pub async fn later_pass_is_in(
    conn: &mut PgConnection,
    source_id: i16,
    pass_id: i64,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from collector_progress where source_id = $1
             and least(pass_id, (select min(pass_id) - 1 from unreached_offset where source_id = $1)) > greatest($2 + 1, void_pass_id))",
    )
    .bind(source_id)
    .bind(pass_id)
    .fetch_one(conn)
    .await
}

/// The id of the source's newest pass; 0 before the first pass.
pub async fn newest_pass(conn: &mut PgConnection, source_id: i16) -> Result<i64, sqlx::Error> {
    let query = "select pass_id from collector_progress where source_id = $1";
    sqlx::query_scalar(query).bind(source_id).fetch_one(conn).await
}
