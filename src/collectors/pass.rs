//! One pass over coderd's database.

use std::collections::{BTreeSet, HashMap};

use chrono::{DateTime, TimeDelta, Utc};

use super::bounds::{Bounds, WIDE_INTERVAL, before, is_due};
use super::licenses::LicenseVerifier;
use super::open::{Collector, SEEN_LIMIT};
use super::proof::Proof;
use super::ranges::Ranges;
use super::report::{PassReport, PassTotals};
use super::seen_ids::SeenIds;
use super::settings::CollectError;
use super::{identity, licenses, runtime};
use crate::coderd::{Catalog, Horizon, LicenseRow, Reader};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{LicenseChange, NewPass, collector_requests, passes, positions};

/// How often a pass reads coderd's catalog.
const CATALOG_INTERVAL: TimeDelta = TimeDelta::minutes(1);
/// How often a pass reaches back over [`SHORT_OVERLAP`].
const OVERLAP_INTERVAL: TimeDelta = TimeDelta::minutes(1);
/// Clocks of replicas differ by less than this, nearly always.
const SHORT_OVERLAP: TimeDelta = TimeDelta::minutes(10);
/// The ends of the log's partitions.
struct Ends {
    offsets: Vec<(TopicPartition, i64)>,
    /// Partitions that end before the ledger's position.
    behind: BTreeSet<TopicPartition>,
}

impl Collector {
    /// Reads rows that can be new, appends the new ones, and records how far the source is
    /// complete. If coderd has changed since its catalog was read, it begins again. After an error
    /// the next pass reconnects and reads the same rows. It appends an acknowledged row only once.
    pub async fn pass(&mut self) -> Result<PassReport, CollectError> {
        self.lease.check()?;
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => {
                self.catalog_read_at = None;
                self.database.connect().await?
            }
        };
        let mut done = self.pass_with(&mut reader).await;
        if self.catalog_is_cached
            && let Err(CollectError::Coderd(error)) = &done
            && error.is_of_schema()
        {
            self.catalog_read_at = None;
            reader = self.database.connect().await?;
            done = self.pass_with(&mut reader).await;
        }
        let report = done?;
        self.reader = Some(reader);
        Ok(report)
    }

    /// Each statement has its own snapshot, younger than the horizon, so it contains every commit
    /// before the horizon. No transaction stays open in coderd's database while the log
    /// acknowledges. Pages go by keys that a row keeps, so a changed row is not skipped. A canceled
    /// job that a daemon still takes completes again, with a later key.
    async fn pass_with(&mut self, reader: &mut Reader) -> Result<PassReport, CollectError> {
        let started_at = self.clock.now();
        self.check_signatures().await?;
        self.identify(reader).await?;
        let catalog = self.read_catalog(reader, started_at).await?;
        let requested_sweep = self.requested_sweep().await?;
        let bounds = self.bounds(reader.horizon(&catalog).await?, started_at, requested_sweep);
        self.pass_number = self.next_pass();
        self.settle_passes().await?;
        // Hours first: the pages that follow read every row that is counted here.
        let hours = match catalog.has_runtime() {
            true => Some(reader.runtime_hours(runtime::window_start(bounds.now)).await?),
            false => None,
        };
        let mut totals = PassTotals::default();
        self.builds(reader, &catalog, &bounds, &mut totals).await?;
        if catalog.usage_events {
            self.usage(reader, &bounds, &mut totals).await?;
            self.compare_days(reader, &bounds, &mut totals).await?;
        }
        let fetched = self.fetch(reader, &catalog, &mut totals).await?;
        let rows = reader.licenses().await?;
        self.licenses = self.record_licenses(&rows).await?;
        let mut report = totals.report;
        report.full_sweep = bounds.from.is_none();
        report.complete_until = bounds.complete_until.filter(|_| self.unreadable.is_empty());
        report.runtime_complete_until =
            hours.map(|hours| runtime::complete_until(&hours, bounds.now));
        let ends = self.ends(totals.ends).await?;
        let comparable =
            ends.behind.is_empty() && self.behind.is_empty() && self.is_proven(bounds.from).await?;
        if !comparable {
            (report.complete_until, report.runtime_complete_until) = (None, None);
        }
        report.pass_id = self.record(&bounds, &report, comparable, ends.offsets, fetched).await?;
        self.remember(&bounds, &report, comparable);
        self.reread_after_recreation(ends.behind).await?;
        Ok(report)
    }

    /// Why it is not certain that this coderd belongs to the source.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let problem = self.identity.problem.as_ref()?.replace('\n', " ");
        Some(format!(
            "source {}: it is not certain that it is this coderd: {problem}",
            self.source.deployment_id
        ))
    }

    /// Refuses a coderd that does not belong to this source. Asks the ledger each time: an operator
    /// may have accepted another coderd.
    pub(super) async fn identify(&mut self, reader: &mut Reader) -> Result<(), CollectError> {
        let source_id = self.source.deployment_id;
        let facts = identity::read(&self.settings, reader, &self.ledger, source_id).await?;
        if self.identity != facts {
            identity::bind(&self.ledger, source_id, &facts).await?;
        }
        self.identity = facts;
        Ok(())
    }

    /// Records changes of coderd's licenses and returns the present ones.
    async fn record_licenses(
        &self,
        rows: &[LicenseRow],
    ) -> Result<Vec<LicenseChange>, CollectError> {
        let deployment = self.identity.deployment_id.unwrap_or(self.source.deployment_id);
        let verifier = LicenseVerifier { keys: &self.keys, deployment };
        licenses::record(
            &self.ledger,
            &self.lease.lease,
            self.source.id,
            &self.licenses,
            rows,
            verifier,
        )
        .await
    }

    /// The catalog, at most a minute old. A catalog that lacks a part is read in each pass: rows of
    /// that part can come at any time. Logs missing parts when it changes.
    async fn read_catalog(
        &mut self,
        reader: &mut Reader,
        started_at: DateTime<Utc>,
    ) -> Result<Catalog, CollectError> {
        self.catalog_is_cached = !is_due(self.catalog_read_at, started_at, CATALOG_INTERVAL);
        if let Some(catalog) = self.catalog.as_ref().filter(|_| self.catalog_is_cached) {
            return Ok(catalog.clone());
        }
        let catalog = reader.catalog().await?;
        let is_whole = catalog.usage_events && catalog.sees_transactions();
        self.catalog_read_at = is_whole.then_some(started_at);
        if self.catalog.as_ref() != Some(&catalog) {
            for missing in catalog.missing() {
                tracing::info!(missing, "not in this version of coderd");
            }
            self.catalog = Some(catalog.clone());
        }
        Ok(catalog)
    }

    /// Now is the earlier of the database's time and the process's. A given clock also applies to
    /// the source.
    ///
    /// Once a minute the pass reaches back over minutes, and seldom over the whole overlap. A
    /// replica with a slow clock can write rows later than the margin. A wide pass counts the
    /// overlap from the last wide pass, so that it finds each row that came since then, up to the
    /// overlap late.
    fn bounds(
        &self,
        horizon: Horizon,
        started_at: DateTime<Utc>,
        requested_sweep: Option<DateTime<Utc>>,
    ) -> Bounds {
        let now = horizon.now.min(started_at);
        let complete_until = horizon
            .complete_before()
            .map(|complete| before(complete.min(now), self.settings.margin));
        let overlaps = is_due(self.overlapped_at, started_at, OVERLAP_INTERVAL);
        let is_wide = is_due(self.overlapped_widely_at, started_at, WIDE_INTERVAL);
        let overlap = before(now, self.settings.overlap);
        let reach = match is_wide {
            true => self.wide_reach(now),
            false => overlap.max(before(now, SHORT_OVERLAP)),
        };
        let from = self.reread_from.filter(|_| self.is_swept && requested_sweep.is_none());
        Bounds {
            from: from.map(|from| if overlaps || is_wide { from.min(reach) } else { from }),
            complete_until,
            next_from: complete_until.unwrap_or(overlap),
            now,
            started_at,
            overlaps,
            is_wide,
            requested_sweep,
        }
    }

    /// Where a wide pass at `now` begins.
    pub(super) fn wide_reach(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        before(self.overlapped_widely_at.map_or(now, |at| at.min(now)), self.settings.overlap)
    }

    /// The mark of the sweep that an operator has requested. It waits until passes can be compared
    /// with the ledger.
    async fn requested_sweep(&self) -> Result<Option<DateTime<Utc>>, CollectError> {
        if !self.behind.is_empty() || self.proof.is_missing() {
            return Ok(None);
        }
        Ok(self
            .ledger
            .run(async |conn| collector_requests::begin_sweep(conn, self.source.id).await)
            .await?)
    }

    /// The ends of all partitions. All records that this or an earlier pass appended, in any
    /// process, lie before them.
    async fn ends(&self, mut ends: HashMap<TopicPartition, i64>) -> Result<Ends, CollectError> {
        // Positions first: an end that is read later is at or beyond them, unless the topic was
        // recreated.
        let positions: HashMap<TopicPartition, i64> =
            self.ledger.run(positions::list).await?.into_iter().collect();
        let mut behind = BTreeSet::new();
        for topic in Topic::ALL {
            for partition in self.log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.log.watermarks(partition).await?;
                if positions.get(&partition).is_some_and(|position| end < *position) {
                    behind.insert(partition);
                }
                let known = ends.entry(partition).or_default();
                *known = (*known).max(end);
            }
        }
        let mut offsets: Vec<(TopicPartition, i64)> =
            ends.into_iter().filter(|(_, end)| *end > 0).collect();
        offsets.sort_unstable();
        Ok(Ends { offsets, behind })
    }

    /// Records the pass. If it cannot be compared with the ledger, it is not a full sweep, or the
    /// source would look backfilled.
    async fn record(
        &self,
        bounds: &Bounds,
        report: &PassReport,
        comparable: bool,
        offsets: Vec<(TopicPartition, i64)>,
        fetched: Vec<String>,
    ) -> Result<i64, CollectError> {
        let pass = NewPass {
            source_id: self.source.id,
            started_at: bounds.started_at,
            complete_until: report.complete_until,
            runtime_complete_until: report.runtime_complete_until,
            full_sweep: report.full_sweep && comparable,
            produced: report.builds.saturating_add(report.claims).saturating_add(report.usage),
            late: report.late,
            offsets,
            last_records: self
                .last_records
                .iter()
                .map(|(at, (offset, message))| (*at, *offset, message.clone()))
                .collect(),
            previous: self.previous,
            unproven_after: self.proof.unproven_after(),
            fetched,
            requested_sweep: bounds.requested_sweep.filter(|_| comparable),
        };
        Ok(self
            .ledger
            .run(async |conn| passes::record(conn, &self.lease.lease, &pass).await)
            .await?)
    }

    /// Keeps the state for the next pass, only after success: a failed pass is read again from its
    /// start.
    fn remember(&mut self, bounds: &Bounds, report: &PassReport, comparable: bool) {
        self.previous = Some((report.pass_id, bounds.started_at));
        self.last_records.clear();
        if comparable {
            self.passes_ahead.push_back((self.pass_number, report.pass_id));
        }
        self.reported_until = self.reported_until.max(report.complete_until);
        self.reread_from = Some(bounds.next_from);
        self.ranges.join(bounds.next_from);
        self.is_swept |= report.full_sweep;
        if bounds.overlaps {
            self.overlapped_at = Some(bounds.started_at);
        }
        if bounds.is_wide {
            self.overlapped_widely_at = Some(bounds.started_at);
        }
        let next_from = bounds.next_from.min(self.wide_reach(bounds.now));
        self.builds.forget(next_from, self.pass_in_ledger);
        self.claims.forget(next_from, self.pass_in_ledger);
        self.usage.forget(
            next_from.min(before(bounds.now, self.settings.usage_window)),
            self.pass_in_ledger,
        );
    }

    /// A recreated topic begins at 0, so the ledger's old position looks as if the new topic had
    /// been read. Until the position is corrected, completeness is not reported. Unread records of
    /// the old topic are lost: all rows are reread. Then only the ledger and the new topic are
    /// known.
    async fn reread_after_recreation(
        &mut self,
        behind: BTreeSet<TopicPartition>,
    ) -> Result<(), CollectError> {
        if behind.is_empty() && !self.behind.is_empty() {
            tracing::info!("ledger positions are within the log again, rereading all rows");
            (self.builds, self.claims, self.usage) =
                (SeenIds::new(SEEN_LIMIT), SeenIds::new(SEEN_LIMIT), SeenIds::new(SEEN_LIMIT));
            self.ranges = Ranges::default();
            self.passes_ahead.clear();
            self.proof = Proof::default();
            self.reread_from = None;
            self.remember_in_flight().await?;
        } else if !behind.is_subset(&self.behind) {
            let partitions: Vec<String> =
                behind.iter().map(|at| format!("{}/{}", at.topic.name(), at.partition)).collect();
            tracing::warn!(
                ?partitions,
                "the log ends before the ledger's position: was the topic recreated? Completeness is not reported"
            );
        }
        self.behind = behind;
        Ok(())
    }

    /// Notes which passes of this process the ledger has read.
    async fn settle_passes(&mut self) -> Result<(), CollectError> {
        while let Some((number, pass_id)) = self.passes_ahead.front().copied() {
            if !self
                .ledger
                .run(async |conn| passes::is_confirmed(conn, self.source.id, pass_id).await)
                .await?
            {
                break;
            }
            self.pass_in_ledger = number;
            self.passes_ahead.pop_front();
        }
        Ok(())
    }
}
