//! Compares one slice of source and ledger. Both databases compute a digest of their rows; only
//! where these differ are the rows themselves read.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::joint::Joint;
use super::sides::{BUILD_TOPICS, BuildDigests, Sides, Suspects};
use crate::coderd::Time;
use crate::event::{Digest, Topic};
use crate::ledger::slices::{self, Presence, Range, UsagePlace};
use crate::ledger::{confirmed, known};

/// Rows in one slice.
pub(super) const SLICE: i64 = 5_000;
/// Usage ids of coderd in one page: only its primary key is read.
const IDS: i64 = 10_000;
/// Rows in one reading, where a slice differs.
const PAGE: i64 = 2_000;

/// No event is earlier.
pub(super) const FIRST: DateTime<Utc> = DateTime::UNIX_EPOCH;
/// All events are earlier: 10000-01-01.
pub(super) const END: DateTime<Utc> = DateTime::from_timestamp(253_402_300_800, 0).unwrap();

/// What slices have found and counted.
#[derive(Default, serde::Serialize, serde::Deserialize)]
pub(super) struct Found {
    pub suspects: Suspects,
    pub source_builds: i64,
    pub ledger_builds: i64,
    pub source_usage: i64,
    pub ledger_usage: i64,
    pub slices: i64,
    /// Slices whose rows were read.
    pub slices_read: i64,
}

impl Found {
    pub(super) fn count(&self, joint: &mut Joint) {
        for (name, number) in [
            ("source_builds", self.source_builds),
            ("ledger_builds", self.ledger_builds),
            ("source_usage", self.source_usage),
            ("ledger_usage", self.ledger_usage),
            ("slices", self.slices),
            ("slices_that_differed_at_first", self.slices_read),
        ] {
            joint.number(name, number);
        }
    }
}

impl Sides<'_> {
    /// Compares the builds and claims of one slice, from the start of the range. Returns the end of
    /// the slice; none: it is the end of the range.
    pub(super) async fn build_slice(
        &mut self,
        range: Range,
        found: &mut Found,
    ) -> anyhow::Result<Option<DateTime<Utc>>> {
        let (from, end) = range;
        let source_id = self.source.id;
        let ends_at =
            self.ledger.run(async |conn| slices::end(conn, source_id, range, SLICE).await).await?;
        let mut slice = (from, ends_at.unwrap_or(end));
        let mut in_source = self.source_slice(slice).await?;
        let mut is_whole = true;
        if in_source.jobs > 2 * SLICE {
            // coderd has many more rows than the ledger here, or many of one instant
            match in_source.last_at.and_then(Time::instant) {
                Some(last) if from < last && last < slice.1 => {
                    slice.1 = last;
                    in_source = self.source_slice(slice).await?;
                }
                last => {
                    is_whole = false;
                    // the rows of one instant are read, and no later ones
                    if last.is_some_and(|last| last <= from) {
                        slice.1 = slice.1.min(from + TimeDelta::microseconds(1));
                    }
                }
            }
        }
        let in_ledger = self
            .ledger
            .run(async |conn| slices::events(conn, source_id, slice, &in_source.odd).await)
            .await?;
        found.slices += 1;
        found.source_builds += in_source.builds + in_source.odd.len() as i64;
        found.ledger_builds += in_ledger.builds;
        if is_whole
            && (in_source.builds, in_source.claims) == (in_ledger.builds, in_ledger.claims)
            && in_source.builds_digest == in_ledger.builds_digest
            && in_source.claims_digest == in_ledger.claims_digest
        {
            self.confirm(Topic::WorkspaceBuilds, &texts(&in_ledger.unconfirmed_builds)).await?;
            self.confirm(Topic::PrebuildClaims, &texts(&in_ledger.unconfirmed_claims)).await?;
        } else {
            found.slices_read += 1;
            self.build_rows(slice, found).await?;
        }
        found.suspects.builds.extend(in_source.odd);
        Ok((slice.1 < end).then_some(slice.1))
    }

    async fn source_slice(&mut self, range: Range) -> anyhow::Result<crate::coderd::BuildSlice> {
        let (from, until) = self.source_range(range);
        Ok(self.reader.build_slice(&self.catalog, from, until, 2 * SLICE + 1).await?)
    }

    /// The first and the last instant of the range in coderd, without the source's baseline. Times
    /// that no event can have belong to the outermost slices.
    fn source_range(&self, (from, until): Range) -> (Time, Time) {
        let from = match self.source.baseline_until {
            Some(baseline) => Time::from(baseline.max(from)),
            None if from <= FIRST => Time::NEGATIVE_INFINITY,
            None => Time::from(from),
        };
        let last = match until >= END {
            true => Time::INFINITY,
            false => Time::from(until - TimeDelta::microseconds(1)),
        };
        (from, last)
    }

    /// Reads the rows of a slice on both sides, in pages.
    async fn build_rows(&mut self, range: Range, found: &mut Found) -> anyhow::Result<()> {
        let (from, last) = self.source_range(range);
        let (mut after, mut seen) = ((from, Uuid::nil()), HashSet::new());
        loop {
            let keys = self.reader.build_keys_until(after, last, PAGE).await?;
            let Some(key) = keys.last() else { break };
            after = (key.completed_at, key.job_id);
            let ids: Vec<Uuid> = keys.iter().filter_map(|key| key.build_id).collect();
            self.source_page(&ids, found).await?;
            seen.extend(ids);
        }
        let mut after = None;
        loop {
            let places = self
                .ledger
                .run(async |conn| slices::build_ids(conn, self.source.id, range, after, PAGE).await)
                .await?;
            let Some(place) = places.last() else { return Ok(()) };
            after = Some(*place);
            let ids: Vec<Uuid> =
                places.into_iter().map(|(_, id)| id).filter(|id| !seen.contains(id)).collect();
            self.ledger_page(ids, found).await?;
        }
    }

    /// Compares these builds of the ledger with coderd's rows, in pages.
    pub(super) async fn ledger_builds(
        &mut self,
        ids: Vec<Uuid>,
        found: &mut Found,
    ) -> anyhow::Result<()> {
        for ids in ids.chunks(PAGE as usize) {
            self.ledger_page(ids.to_vec(), found).await?;
        }
        Ok(())
    }

    /// Compares this usage of the ledger with coderd's rows, in pages.
    pub(super) async fn ledger_usage(
        &mut self,
        ids: &[String],
        found: &mut Found,
    ) -> anyhow::Result<()> {
        for ids in ids.chunks(PAGE as usize) {
            self.usage_rows(ids, found).await?;
        }
        Ok(())
    }

    /// Compares builds that coderd has.
    async fn source_page(&mut self, ids: &[Uuid], found: &mut Found) -> anyhow::Result<()> {
        let in_ledger = self.ledger_digests(ids).await?;
        let in_source = self.source_digests(ids).await?;
        self.confirm_builds(&in_ledger, &in_source).await?;
        let differs = |id: &&Uuid| {
            in_source.get(*id).is_some_and(|in_source| {
                in_source.as_ref() != Some(in_ledger.get(*id).unwrap_or(&[None, None]))
            })
        };
        found.suspects.builds.extend(ids.iter().filter(differs));
        Ok(())
    }

    /// Compares builds that the ledger has. Confirmed ones that coderd no longer has are marked as
    /// gone.
    async fn ledger_page(&mut self, ids: Vec<Uuid>, found: &mut Found) -> anyhow::Result<()> {
        let in_source = self.source_digests(&ids).await?;
        let (there, missing): (Vec<Uuid>, Vec<Uuid>) =
            ids.into_iter().partition(|id| in_source.contains_key(id));
        self.source_page(&there, found).await?;
        let confirmed = self
            .ledger
            .run(async |conn| confirmed::builds(conn, self.source.id, &missing).await)
            .await?;
        let mut gone = [Vec::new(), Vec::new()];
        for id in missing {
            match confirmed.get(&id) {
                Some(events) if !events.contains(&Some(false)) => {
                    for (gone, event) in gone.iter_mut().zip(events) {
                        gone.extend(event.map(|_| id.to_string()));
                    }
                }
                _ => drop(found.suspects.builds.insert(id)),
            }
        }
        let [builds, claims] = gone;
        self.mark(Topic::WorkspaceBuilds, &builds, Presence::Gone).await?;
        self.mark(Topic::PrebuildClaims, &claims, Presence::Gone).await
    }

    /// Confirms the events that are equal in coderd.
    async fn confirm_builds(
        &self,
        in_ledger: &HashMap<Uuid, BuildDigests>,
        in_source: &HashMap<Uuid, Option<BuildDigests>>,
    ) -> anyhow::Result<()> {
        for (at, topic) in BUILD_TOPICS.into_iter().enumerate() {
            let same = |(id, in_ledger): &(&Uuid, &BuildDigests)| {
                in_ledger[at].is_some()
                    && in_source.get(id).is_some_and(|in_source| {
                        in_source.is_some_and(|in_source| in_source[at] == in_ledger[at])
                    })
            };
            let equal: Vec<String> =
                in_ledger.iter().filter(same).map(|(id, _)| id.to_string()).collect();
            self.confirm(topic, &equal).await?;
            self.mark(topic, &equal, Presence::Back).await?;
        }
        Ok(())
    }

    /// Compares a page of the ledger's usage with coderd's rows of the same ids. Returns the last
    /// event of a full page.
    pub(super) async fn usage_slice(
        &mut self,
        range: Range,
        after: &str,
        found: &mut Found,
    ) -> anyhow::Result<Option<(DateTime<Utc>, String)>> {
        let places = self
            .ledger
            .run(async |conn| slices::usage(conn, self.source.id, range, after, SLICE).await)
            .await?;
        let Some(last) = places.last() else { return Ok(None) };
        let last = (last.created_at, last.id.clone());
        let ids: Vec<String> = places.iter().map(|place| place.id.clone()).collect();
        let in_source = self.reader.usage_page(&ids).await?;
        let odd: HashSet<&String> = in_source.odd.iter().collect();
        let plain: Vec<&UsagePlace> =
            places.iter().filter(|place| !odd.contains(&place.id)).collect();
        found.slices += 1;
        found.ledger_usage += ids.len() as i64;
        if in_source.rows == ids.len() as i64
            && in_source.digest == slices::digest_of(digests(&plain))
        {
            let unconfirmed: Vec<String> = plain
                .iter()
                .filter(|place| !place.is_confirmed)
                .map(|place| place.id.clone())
                .collect();
            self.confirm(Topic::AgentUsage, &unconfirmed).await?;
        } else {
            found.slices_read += 1;
            self.ledger_usage(&ids, found).await?;
        }
        let is_full = ids.len() as i64 == SLICE;
        found.suspects.usage.extend(in_source.odd);
        Ok(is_full.then_some(last))
    }

    async fn usage_rows(&mut self, ids: &[String], found: &mut Found) -> anyhow::Result<()> {
        let in_ledger =
            self.ledger.run(async |conn| known::usage(conn, self.source.id, ids).await).await?;
        let in_source = self.source_usage_digests(ids).await?;
        let (equal, differ): (Vec<String>, Vec<String>) =
            ids.iter().cloned().partition(|id| match in_source.get(id) {
                Some(Ok(in_source)) => in_ledger.get(id) == Some(in_source),
                _ => false,
            });
        self.confirm(Topic::AgentUsage, &equal).await?;
        found.suspects.usage.extend(differ);
        Ok(())
    }

    /// Looks for a page of coderd's usage ids in the ledger. Returns the last id of a full page.
    /// Pages go by coderd's own order of ids, which may differ from the ledger's.
    pub(super) async fn source_usage_slice(
        &mut self,
        after: &str,
        found: &mut Found,
    ) -> anyhow::Result<Option<String>> {
        let mut ids = self.reader.usage_ids(after, IDS).await?;
        self.look_up_usage(&ids, found).await?;
        found.slices += 1;
        let is_full = ids.len() as i64 == IDS;
        Ok(ids.pop().filter(|_| is_full))
    }

    /// Ids of coderd that the ledger does not have become suspects.
    pub(super) async fn look_up_usage(
        &self,
        ids: &[String],
        found: &mut Found,
    ) -> anyhow::Result<()> {
        found.source_usage += ids.len() as i64;
        let unknown = self
            .ledger
            .run(async |conn| slices::unknown_usage(conn, self.source.id, ids).await)
            .await?;
        found.suspects.usage.extend(unknown);
        Ok(())
    }

    pub(super) async fn confirm(&self, topic: Topic, keys: &[String]) -> anyhow::Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let now = self.ledger.clock.now();
        let confirming =
            async |conn: &mut _| confirmed::record(conn, topic, self.source.id, keys, now).await;
        Ok(self.ledger.run(confirming).await?)
    }

    pub(super) async fn mark(
        &self,
        topic: Topic,
        keys: &[String],
        presence: Presence,
    ) -> anyhow::Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let now = self.ledger.clock.now();
        Ok(self
            .ledger
            .run(async |conn| slices::mark(conn, topic, self.source.id, keys, presence, now).await)
            .await?)
    }
}

fn texts(ids: &[Uuid]) -> Vec<String> {
    ids.iter().map(Uuid::to_string).collect()
}

fn digests(places: &[&UsagePlace]) -> Vec<Digest> {
    places.iter().map(|place| place.digest).collect()
}
