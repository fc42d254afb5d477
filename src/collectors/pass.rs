//! One pass over coderd's database.

use std::collections::HashMap;
use std::time::Instant;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::open::Collector;
use super::settings::CollectError;
use super::{events, licenses, runtime};
use crate::coderd::{BuildKey, Catalog, Horizon, Reader, UsageKey};
use crate::event::{Event, Message, Payload, Topic, TopicPartition};
use crate::ledger::NewPass;

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassReport {
    /// The ledger's id of the pass.
    pub pass_id: i64,
    /// It read everything.
    pub full_sweep: bool,
    /// Builds appended to the log.
    pub builds: i32,
    /// Claims appended to the log.
    pub claims: i32,
    /// Usage events appended to the log.
    pub usage: i32,
    /// Builds and usage found later than an earlier pass had claimed to be complete.
    pub late: i32,
    /// What coderd committed before this is in the log. None: nothing is claimed.
    pub complete_until: Option<DateTime<Utc>>,
    /// The hour before which every hour has its runtime row or is over 7 days old. None: this coderd has no agent runtime.
    pub runtime_complete_until: Option<DateTime<Utc>>,
}

/// What one pass reads, and what it may claim.
struct Bounds {
    /// Where an incremental pass begins; None: everything is read.
    from: Option<DateTime<Utc>>,
    complete_until: Option<DateTime<Utc>>,
    /// Where the next pass begins.
    next_from: DateTime<Utc>,
    now: DateTime<Utc>,
}

/// Where the appended records end, and the counts.
#[derive(Default)]
struct Appended {
    report: PassReport,
    ends: HashMap<TopicPartition, i64>,
}

impl Collector {
    /// Reads what can be new, appends what is, and records how far the source is complete. After an error the next pass connects anew and
    /// reads the same again; what was acknowledged is not appended twice.
    ///
    /// # Errors
    /// [`CollectError`]
    pub async fn pass(&mut self) -> Result<PassReport, CollectError> {
        self.keep_lease().await?;
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => self.database.connect().await?,
        };
        let report = self.pass_with(&mut reader).await?;
        self.reader = Some(reader);
        Ok(report)
    }

    /// Every statement is a snapshot of its own, and each is younger than the horizon: what was committed before it is in all of them. Pages
    /// go by keys that a row keeps, so a row that changes in between is not skipped. (A canceled job that a daemon still takes completes
    /// again, later: it moves ahead.) So nothing is held open in coderd's database while the log acknowledges.
    async fn pass_with(&mut self, reader: &mut Reader) -> Result<PassReport, CollectError> {
        let started_at = self.clock.now();
        let catalog = self.look_around(reader).await?;
        let bounds = self.bounds(reader.horizon().await?, started_at);
        self.pass_number += 1;
        self.learn_what_is_in().await?;
        // The hours first: a row that is counted here is met by the pages that follow.
        let hours = match catalog.has_runtime() {
            true => Some(reader.runtime_hours(runtime::window_start(bounds.now)).await?),
            false => None,
        };
        let mut appended = Appended::default();
        self.builds(reader, &catalog, &bounds, &mut appended).await?;
        if catalog.usage_events {
            self.usage(reader, &bounds, &mut appended).await?;
        }
        let rows = reader.licenses().await?;
        self.licenses = licenses::record(&self.ledger, self.source.id, std::mem::take(&mut self.licenses), &rows, &self.keys).await?;
        let mut report = appended.report;
        report.full_sweep = bounds.from.is_none();
        report.complete_until = bounds.complete_until.filter(|_| self.unreadable.is_empty());
        report.runtime_complete_until = hours.map(|hours| runtime::complete_until(&hours, bounds.now));
        report.pass_id = self.record(started_at, &report, appended.ends).await?;
        self.remember(&bounds, started_at, &report);
        Ok(report)
    }

    /// What there is to read; said when it is not what it was.
    async fn look_around(&mut self, reader: &mut Reader) -> Result<Catalog, CollectError> {
        let catalog = reader.catalog().await?;
        if self.catalog.as_ref() != Some(&catalog) {
            for missing in catalog.missing() {
                tracing::info!(missing, "not in this version of coderd");
            }
            self.catalog = Some(catalog.clone());
        }
        Ok(catalog)
    }

    /// Now is the earlier of the database's and our own: where the clock is a given one, the source lives by it too.
    fn bounds(&self, horizon: Horizon, started_at: DateTime<Utc>) -> Bounds {
        let now = horizon.now.min(started_at);
        let complete_until = horizon.complete_before().map(|before| before.min(now) - self.settings.margin);
        let swept_recently = self.swept_at.is_some_and(|swept_at| started_at - swept_at < self.settings.sweep_interval);
        Bounds {
            from: self.reread_from.filter(|_| swept_recently),
            complete_until,
            next_from: complete_until.unwrap_or(now - self.settings.blind_overlap),
            now,
        }
    }

    async fn builds(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        bounds: &Bounds,
        appended: &mut Appended,
    ) -> Result<(), CollectError> {
        let page = self.settings.page;
        let mut swept = Uuid::nil();
        let mut recent = (bounds.from.unwrap_or(bounds.now), Uuid::nil());
        loop {
            self.keep_lease().await?;
            let keys = match bounds.from {
                Some(_) => reader.recent_build_keys(recent, page).await?,
                None => reader.build_keys(swept, page).await?,
            };
            self.take_builds(reader, catalog, &keys, appended).await?;
            match keys.last() {
                Some(last) if full(keys.len(), page) => (swept, recent) = (last.job_id, (last.completed_at, last.job_id)),
                _ => return Ok(()),
            }
        }
    }

    /// Appends those of these builds that are new. The claim goes first: a build that is known then proves that its claim is in the log.
    async fn take_builds(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        keys: &[BuildKey],
        appended: &mut Appended,
    ) -> Result<(), CollectError> {
        let from = self.source.baseline_until.unwrap_or(DateTime::<Utc>::MIN_UTC);
        let unseen = keys.iter().filter(|key| key.completed_at >= from).filter_map(|key| Some((key.build_id?, key.completed_at)));
        let unseen: HashMap<Uuid, DateTime<Utc>> = unseen.filter(|(id, _)| !self.builds.contains(id)).collect();
        if unseen.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = unseen.keys().copied().collect();
        let known = self.ledger.known_builds(self.source.id, &ids).await?;
        let (known, unknown): (Vec<Uuid>, Vec<Uuid>) = ids.into_iter().partition(|id| known.contains_key(id));
        for id in known {
            self.builds.insert(id, unseen[&id], self.pass_number);
        }
        let (claims, builds) = self.build_events(reader, catalog, &unknown).await?;
        let late = builds.iter().filter(|build| self.is_late(build.time())).count();
        let sent = claims.iter().map(Event::to_message).collect();
        appended.report.claims += self.append(Topic::PrebuildClaims, sent, &mut appended.ends, |_, _| {}).await?;
        let sent = builds.iter().map(Event::to_message).collect();
        appended.report.builds += self
            .append(Topic::WorkspaceBuilds, sent, &mut appended.ends, |collector, index| {
                if let Payload::Build(build) = &builds[index].payload {
                    collector.builds.insert(build.build_id, build.completed_at, collector.pass_number);
                }
            })
            .await?;
        appended.report.late += count(late);
        Ok(())
    }

    /// The claims and the builds among these, without those that the ledger has refused before.
    async fn build_events(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        ids: &[Uuid],
    ) -> Result<(Vec<Event>, Vec<Event>), CollectError> {
        let deployment = self.source.deployment_id;
        let (mut claims, mut builds) = (Vec::new(), Vec::new());
        if ids.is_empty() {
            return Ok((claims, builds));
        }
        for row in reader.builds(catalog, ids).await? {
            let build_id = row.build_id;
            match events::build(row) {
                Ok(build) => {
                    self.unreadable.remove(&build_id);
                    let claim = events::claim(&build);
                    claims.extend(claim.map(|claim| Event { deployment, payload: Payload::Claim(Box::new(claim)) }));
                    builds.push(Event { deployment, payload: Payload::Build(Box::new(build)) });
                }
                Err(error) if self.unreadable.insert(build_id) => {
                    tracing::error!(%error, "a build cannot be collected; nothing is claimed to be complete until it can");
                }
                Err(_) => {}
            }
        }
        let event_ids: Vec<String> = claims.iter().chain(&builds).map(Event::id).collect();
        let refused = self.ledger.refused_ids(deployment, &event_ids).await?;
        claims.retain(|claim| !refused.contains(&claim.id()));
        builds.retain(|build| !refused.contains(&build.id()));
        Ok((claims, builds))
    }

    async fn usage(&mut self, reader: &mut Reader, bounds: &Bounds, appended: &mut Appended) -> Result<(), CollectError> {
        let page = self.settings.page;
        let mut last: Option<UsageKey> = None;
        loop {
            self.keep_lease().await?;
            let keys = match bounds.from {
                Some(from) => {
                    let dated_since = bounds.now - self.settings.usage_window;
                    reader.recent_usage_keys(dated_since.min(from), from, last.as_ref(), page).await?
                }
                None => reader.usage_keys(last.as_ref().map_or("", |key| &key.id), page).await?,
            };
            self.take_usage(reader, &keys, appended).await?;
            if !full(keys.len(), page) {
                return Ok(());
            }
            last = keys.into_iter().next_back();
        }
    }

    /// Appends those of these usage events that are new.
    async fn take_usage(&mut self, reader: &mut Reader, keys: &[UsageKey], appended: &mut Appended) -> Result<(), CollectError> {
        let unseen: HashMap<&String, DateTime<Utc>> =
            keys.iter().filter(|key| !self.usage.contains(&key.id)).map(|key| (&key.id, key.created_at)).collect();
        if unseen.is_empty() {
            return Ok(());
        }
        let ids: Vec<String> = unseen.keys().map(|id| (*id).clone()).collect();
        let known = self.ledger.known_usage(self.source.id, &ids).await?;
        let refused = self.ledger.refused_ids(self.source.deployment_id, &ids).await?;
        let (known, unknown): (Vec<String>, Vec<String>) = ids.into_iter().partition(|id| known.contains_key(id) || refused.contains(id));
        for id in known {
            let at = unseen[&id];
            self.usage.insert(id, at, self.pass_number);
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let rows = reader.usage(&unknown).await?;
        // A runtime row is dated by its hour and rightly comes later; the others are dated by the moment they are written.
        let late = rows.iter().filter(|row| row.event_type != "hb_agent_runtime_v1" && self.is_late(row.created_at)).count();
        let sent: Vec<(String, DateTime<Utc>)> = rows.iter().map(|row| (row.id.clone(), row.created_at)).collect();
        let messages = rows.into_iter().map(|row| events::usage(self.source.deployment_id, row)).collect();
        appended.report.usage += self
            .append(Topic::AgentUsage, messages, &mut appended.ends, |collector, index| {
                let (id, at) = sent[index].clone();
                collector.usage.insert(id, at, collector.pass_number);
            })
            .await?;
        appended.report.late += count(late);
        Ok(())
    }

    /// Appends messages; `acknowledged` is told the index of each that the log has, also when not all are. Answers how many.
    async fn append(
        &mut self,
        topic: Topic,
        messages: Vec<Message>,
        ends: &mut HashMap<TopicPartition, i64>,
        acknowledged: impl Fn(&mut Self, usize),
    ) -> Result<i32, CollectError> {
        if messages.is_empty() {
            return Ok(0);
        }
        let answer = self.log.append(topic, messages).await;
        let placed: Vec<Option<(i32, i64)>> = match &answer {
            Ok(placed) => placed.iter().copied().map(Some).collect(),
            Err(error) => error.placed.clone(),
        };
        for (index, (partition, offset)) in placed.into_iter().enumerate().filter_map(|(index, place)| Some((index, place?))) {
            let end = ends.entry(TopicPartition { topic, partition }).or_default();
            *end = (*end).max(offset + 1);
            acknowledged(self, index);
        }
        Ok(count(answer?.len()))
    }

    /// The ends of all partitions: whatever this and earlier passes appended, by this process or another, lies before them.
    async fn record(
        &mut self,
        started_at: DateTime<Utc>,
        report: &PassReport,
        mut ends: HashMap<TopicPartition, i64>,
    ) -> Result<i64, CollectError> {
        for topic in Topic::ALL {
            for partition in self.log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.log.watermarks(partition).await?;
                let known = ends.entry(partition).or_default();
                *known = (*known).max(end);
            }
        }
        let mut offsets: Vec<(TopicPartition, i64)> = ends.into_iter().filter(|(_, end)| *end > 0).collect();
        offsets.sort_unstable();
        let pass = NewPass {
            source_id: self.source.id,
            started_at,
            complete_until: report.complete_until,
            runtime_complete_until: report.runtime_complete_until,
            full_sweep: report.full_sweep,
            produced: report.builds + report.claims + report.usage,
            late: report.late,
            offsets,
        };
        Ok(self.ledger.record_pass(&pass).await?)
    }

    /// What the next pass builds on. Only now: a pass that failed is read again from where it began.
    fn remember(&mut self, bounds: &Bounds, started_at: DateTime<Utc>, report: &PassReport) {
        self.passes_ahead.push_back((self.pass_number, report.pass_id));
        self.claimed_until = self.claimed_until.max(report.complete_until);
        self.reread_from = Some(bounds.next_from);
        if report.full_sweep {
            self.swept_at = Some(started_at);
        }
        self.builds.forget(bounds.next_from, self.pass_in_ledger);
        self.usage.forget(bounds.next_from.min(bounds.now - self.settings.usage_window), self.pass_in_ledger);
    }

    /// Which passes of ours are in the ledger by now.
    async fn learn_what_is_in(&mut self) -> Result<(), CollectError> {
        while let Some((number, pass_id)) = self.passes_ahead.front().copied() {
            if !self.ledger.pass_is_in(pass_id).await? {
                break;
            }
            self.pass_in_ledger = number;
            self.passes_ahead.pop_front();
        }
        Ok(())
    }

    fn is_late(&self, at: DateTime<Utc>) -> bool {
        self.claimed_until.is_some_and(|claimed| at < claimed)
    }

    /// Holds the source while a long pass runs.
    pub(super) async fn keep_lease(&mut self) -> Result<(), CollectError> {
        if self.renewed.elapsed() < self.settings.lease_length / 3 {
            return Ok(());
        }
        let asked = Instant::now();
        if !self.ledger.renew_lease(&self.lease, self.settings.lease_length).await? {
            return Err(CollectError::LeaseLost);
        }
        self.renewed = asked;
        Ok(())
    }
}

fn full(length: usize, page: i64) -> bool {
    i64::try_from(length).is_ok_and(|length| length >= page)
}

fn count(length: usize) -> i32 {
    i32::try_from(length).unwrap_or(i32::MAX)
}
