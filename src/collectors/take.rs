//! Reads pages of coderd's rows and appends the new ones to the log.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::bounds::{Bounds, before};
use super::events::{self, InvalidRow};
use super::open::Collector;
use super::report::{PassReport, PassTotals};
use super::settings::CollectError;
use super::telemetry::{LATE_BUILD, LATE_USAGE};
use crate::coderd::{BuildKey, Catalog, Reader, Time, UsageKey, UsageRow};
use crate::event::{Event, Message, Payload, Signer, Topic, TopicPartition, UsageType};
use crate::ledger::{collector_requests, known};
use crate::log::{AppendError, Log, LogError};

/// A row that is not known yet, as a message.
struct Candidate<Id> {
    id: Id,
    event_id: String,
    at: Time,
    message: Message,
}

#[derive(Default)]
struct BuildCandidates {
    claims: Vec<Candidate<Uuid>>,
    builds: Vec<Candidate<Uuid>>,
}

impl Collector {
    /// Collects all builds of the pass, page by page.
    pub(super) async fn builds(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        bounds: &Bounds,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        match bounds.from {
            Some(from) => self.recent_builds(reader, catalog, (from, bounds), totals).await?,
            None => self.all_builds(reader, catalog, bounds, totals).await?,
        }
        self.reread_unreadable(reader, catalog, totals).await
    }

    async fn all_builds(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        bounds: &Bounds,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let page = self.settings.page;
        let mut swept = Uuid::nil();
        loop {
            self.lease.check()?;
            let keys = reader.build_keys(swept, page).await?;
            self.take_builds(reader, catalog, &keys, totals).await?;
            self.count_rows(bounds, keys.len(), totals).await?;
            match keys.last() {
                Some(last) if full(keys.len(), page) => swept = last.job_id,
                _ => return Ok(()),
            }
        }
    }

    /// Rereads a page of the builds that an earlier pass could not read. A build that coderd no
    /// longer has holds nothing back.
    async fn reread_unreadable(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let page = usize::try_from(self.settings.page).unwrap_or(usize::MAX);
        let earlier = self.unreadable.iter().filter(|id| !totals.unreadable.contains(*id));
        let ids: Vec<Uuid> = earlier.take(page).copied().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let keys = reader.build_keys_of(&ids).await?;
        let present: HashSet<Uuid> = keys.iter().filter_map(|key| key.build_id).collect();
        for id in ids.iter().filter(|id| !present.contains(*id)) {
            self.unreadable.remove(id);
        }
        self.take_builds(reader, catalog, &keys, totals).await
    }

    /// Appends the new ones of these builds, each prebuild claim before its build. Also appends a
    /// missing claim of a known build. They are in different topics: one can be lost while the
    /// other is read.
    pub(super) async fn take_builds(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        keys: &[BuildKey],
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let from = self.source.baseline_until.map(Time::from);
        let unseen = keys.iter().filter(|key| from.is_none_or(|from| key.completed_at >= from));
        let unseen = unseen.filter_map(|key| Some((key.build_id?, key.completed_at)));
        let unseen: Vec<(Uuid, Time)> =
            unseen.filter(|(id, _)| !self.builds.contains(id)).collect();
        if unseen.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = unseen.iter().map(|(id, _)| *id).collect();
        let unseen: HashMap<Uuid, Time> = unseen.into_iter().collect();
        let known =
            self.ledger.run(async |conn| known::builds(conn, self.source.id, &ids).await).await?;
        let (known, unknown): (Vec<Uuid>, Vec<Uuid>) =
            ids.into_iter().partition(|id| known.contains_key(id));
        let mut claimless = self
            .ledger
            .run(async |conn| known::builds_without_claim(conn, self.source.id, &known).await)
            .await?;
        claimless.retain(|id| !self.claims.contains(id));
        let wanted = [unknown, claimless.clone()].concat();
        let BuildCandidates { claims, mut builds } =
            self.build_candidates(reader, catalog, &wanted, &mut totals.unreadable).await?;
        builds.retain(|build| !claimless.contains(&build.id));
        let late: Vec<Time> =
            builds.iter().map(|build| build.at).filter(|at| self.is_late(*at)).collect();
        let sent = claims.into_iter().map(|claim| claim.message).collect();
        let claims = self.append(Topic::PrebuildClaims, sent, &mut totals.ends, |_, _| {}).await?;
        totals.report.claims = totals.report.claims.saturating_add(claims);
        for id in known {
            self.builds.insert(id, unseen[&id], self.pass_number);
        }
        let (sent, places): (Vec<Message>, Vec<(Uuid, Time)>) =
            builds.into_iter().map(|build| (build.message, (build.id, build.at))).unzip();
        let builds = self
            .append(Topic::WorkspaceBuilds, sent, &mut totals.ends, |collector, index| {
                let (id, at) = places[index];
                collector.builds.insert(id, at, collector.pass_number);
            })
            .await?;
        totals.report.builds = totals.report.builds.saturating_add(builds);
        self.count_late(LATE_BUILD, &late, &mut totals.report);
        Ok(())
    }

    /// The claims and builds of these ids, without those among the rejects that must not be sent
    /// again.
    async fn build_candidates(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        ids: &[Uuid],
        unreadable: &mut HashSet<Uuid>,
    ) -> Result<BuildCandidates, CollectError> {
        let deployment = self.source.deployment_id;
        let mut found = BuildCandidates::default();
        if ids.is_empty() {
            return Ok(found);
        }
        for row in reader.builds(catalog, ids).await? {
            let (id, at) = (row.build_id, row.completed_at);
            let candidate = |event: &Event| Candidate {
                id,
                event_id: event.id(),
                at,
                message: event.to_message(),
            };
            match events::build(deployment, row) {
                Ok(build) => {
                    self.unreadable.remove(&id);
                    let claim = events::claim(&build).map(|claim| Event {
                        deployment,
                        payload: Payload::Claim(Box::new(claim)),
                    });
                    found.claims.extend(claim.as_ref().map(candidate));
                    found.builds.push(candidate(&Event {
                        deployment,
                        payload: Payload::Build(Box::new(build)),
                    }));
                }
                Err(InvalidRow::Time { message, .. }) => {
                    self.unreadable.remove(&id);
                    let event_id = events::id_from(deployment, &message).unwrap_or_default();
                    found.builds.push(Candidate { id, event_id, at, message: *message });
                }
                Err(error @ InvalidRow::UnknownWord { .. }) => {
                    unreadable.insert(id);
                    if self.unreadable.insert(id) {
                        tracing::error!(%error, "build cannot be collected, completeness is not reported until it can");
                    }
                }
            }
        }
        found.claims = self.without_refused(found.claims).await?;
        found.builds = self.without_refused(found.builds).await?;
        Ok(found)
    }

    /// Leaves out messages that are among the ledger's rejects and must not be sent again.
    async fn without_refused<Id>(
        &self,
        mut candidates: Vec<Candidate<Id>>,
    ) -> Result<Vec<Candidate<Id>>, CollectError> {
        if candidates.is_empty() {
            return Ok(candidates);
        }
        let deployment = self.source.deployment_id;
        let ids: Vec<String> =
            candidates.iter().map(|candidate| candidate.event_id.clone()).collect();
        let mut refused =
            self.ledger.run(async |conn| known::refused_ids(conn, deployment, &ids).await).await?;
        if !refused.is_empty() {
            let candidates_to_compare =
                candidates.iter().filter(|candidate| refused.contains(&candidate.event_id));
            let candidates_to_compare = candidates_to_compare
                .map(|candidate| (candidate.event_id.clone(), candidate.message.clone()))
                .collect();
            refused = self
                .ledger
                .run(async |conn| {
                    known::refused_messages(conn, deployment, &candidates_to_compare).await
                })
                .await?;
        }
        candidates.retain(|candidate| !refused.contains(&candidate.event_id));
        Ok(candidates)
    }

    /// Collects all usage of the pass, page by page.
    pub(super) async fn usage(
        &mut self,
        reader: &mut Reader,
        bounds: &Bounds,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let page = self.settings.page;
        let mut last: Option<UsageKey> = None;
        loop {
            self.lease.check()?;
            let keys = match bounds.from {
                Some(from) => {
                    let dated_since = before(bounds.now, self.settings.usage_window);
                    reader
                        .recent_usage_keys(dated_since.min(from), from, last.as_ref(), page)
                        .await?
                }
                None => reader.usage_keys(last.as_ref().map_or("", |key| &key.id), page).await?,
            };
            self.take_usage(reader, &keys, totals).await?;
            self.count_rows(bounds, keys.len(), totals).await?;
            if !full(keys.len(), page) {
                return Ok(());
            }
            last = keys.into_iter().next_back();
        }
    }

    /// Appends the new ones of these usage events.
    pub(super) async fn take_usage(
        &mut self,
        reader: &mut Reader,
        keys: &[UsageKey],
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let unseen: HashMap<&String, Time> = keys
            .iter()
            .filter(|key| !self.usage.contains(&key.id))
            .map(|key| (&key.id, key.created_at))
            .collect();
        if unseen.is_empty() {
            return Ok(());
        }
        let ids: Vec<String> = unseen.keys().map(|id| (*id).clone()).collect();
        let known =
            self.ledger.run(async |conn| known::usage(conn, self.source.id, &ids).await).await?;
        let (known, unknown): (Vec<String>, Vec<String>) =
            ids.into_iter().partition(|id| known.contains_key(id));
        for id in known {
            let at = unseen[&id];
            self.usage.insert(id, at, self.pass_number);
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let rows = reader.usage(&unknown).await?;
        // A runtime row is dated by its hour and comes later by design; other rows are dated when
        // they are written.
        let dated_by_hour: HashSet<String> = rows
            .iter()
            .filter(|row| row.event_type == UsageType::AgentRuntime.as_str())
            .map(|row| row.id.clone())
            .collect();
        let deployment = self.source.deployment_id;
        let candidate = |row: UsageRow| Candidate {
            id: row.id.clone(),
            event_id: row.id.clone(),
            at: row.created_at,
            message: events::usage(deployment, row),
        };
        let new = self.without_refused(rows.into_iter().map(candidate).collect()).await?;
        let late = new.iter().filter(|row| !dated_by_hour.contains(&row.id)).map(|row| row.at);
        let late: Vec<Time> = late.filter(|at| self.is_late(*at)).collect();
        let (sent, places): (Vec<Message>, Vec<(String, Time)>) =
            new.into_iter().map(|row| (row.message, (row.id, row.at))).unzip();
        let usage = self
            .append(Topic::AgentUsage, sent, &mut totals.ends, |collector, index| {
                let (id, at) = places[index].clone();
                collector.usage.insert(id, at, collector.pass_number);
            })
            .await?;
        totals.report.usage = totals.report.usage.saturating_add(usage);
        self.count_late(LATE_USAGE, &late, &mut totals.report);
        Ok(())
    }

    /// Records the progress of a sweep for the operator who requested it.
    async fn count_rows(
        &self,
        bounds: &Bounds,
        rows: usize,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let Some(begun_at) = bounds.requested_sweep else { return Ok(()) };
        totals.rows = totals.rows.saturating_add(i64::try_from(rows).unwrap_or(i64::MAX));
        Ok(self
            .ledger
            .run(async |conn| {
                collector_requests::record_sweep_progress(
                    conn,
                    self.source.id,
                    begun_at,
                    totals.rows,
                )
                .await
            })
            .await?)
    }

    /// Counts rows that came after an earlier pass had reported completeness, with their age.
    fn count_late(&self, kind: &str, late: &[Time], report: &mut PassReport) {
        let now = self.clock.now();
        for at in late {
            self.settings.telemetry.late(kind, at.age(now));
        }
        report.late = report.late.saturating_add(count(late.len()));
    }

    /// Appends messages and returns their number. Calls `acknowledged` with the index of each one
    /// that the log has, even if others fail.
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
        let mut kept = if let Log::Postgres(_) = self.log { messages.clone() } else { Vec::new() };
        let answer = self.log.append_signed(Signer::Collector, topic, messages).await;
        if matches!(&answer, Err(AppendError { cause: LogError::TooLarge { .. }, .. })) {
            self.settings.telemetry.too_large(topic);
        }
        let placed: Vec<Option<(i32, i64)>> = match &answer {
            Ok(placed) => placed.iter().copied().map(Some).collect(),
            Err(error) => error.placed.clone(),
        };
        for (index, (partition, offset)) in
            placed.into_iter().enumerate().filter_map(|(index, place)| Some((index, place?)))
        {
            let end = ends.entry(TopicPartition { topic, partition }).or_default();
            *end = (*end).max(offset.saturating_add(1));
            if let Some(message) = kept.get_mut(index).map(std::mem::take) {
                self.last_records.insert(TopicPartition { topic, partition }, (offset, message));
            }
            self.proof.appended(
                TopicPartition { topic, partition },
                offset,
                self.previous.map(|(pass_id, _)| pass_id),
            );
            acknowledged(self, index);
        }
        Ok(count(answer?.len()))
    }

    fn is_late(&self, at: Time) -> bool {
        self.reported_until.is_some_and(|until| at < until.into())
    }
}

pub(super) fn full(length: usize, page: i64) -> bool {
    i64::try_from(length).is_ok_and(|length| length >= page)
}

fn count(length: usize) -> i32 {
    i32::try_from(length).unwrap_or(i32::MAX)
}
