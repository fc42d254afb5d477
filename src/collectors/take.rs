//! Pages of coderd's rows: what is new among them goes to the log.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::events;
use super::open::Collector;
use super::pass::{Bounds, PassReport};
use super::settings::CollectError;
use crate::coderd::{BuildKey, Catalog, Reader, UsageKey};
use crate::event::{Event, Message, Payload, Topic, TopicPartition};
use crate::log::{AppendError, LogError};

/// Where the appended records end, and the counts.
#[derive(Default)]
pub(super) struct Appended {
    pub(super) report: PassReport,
    pub(super) ends: HashMap<TopicPartition, i64>,
    /// Builds that were met and cannot be read.
    unreadable: HashSet<Uuid>,
}

impl Collector {
    /// All builds that the pass meets, page by page.
    pub(super) async fn builds(
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
            self.lease.check()?;
            let keys = match bounds.from {
                Some(_) => reader.recent_build_keys(recent, page).await?,
                None => reader.build_keys(swept, page).await?,
            };
            self.take_builds(reader, catalog, &keys, appended).await?;
            match keys.last() {
                Some(last) if full(keys.len(), page) => (swept, recent) = (last.job_id, (last.completed_at, last.job_id)),
                _ => break,
            }
        }
        if bounds.from.is_none() {
            // All builds were met. One that is gone from coderd, or can be read by now, holds nothing back any more.
            self.unreadable.retain(|id| appended.unreadable.contains(id));
        }
        Ok(())
    }

    /// Appends those of these builds that are new, each claim before its build. A known build may have lost its claim all the same, for the
    /// two are in different topics, and one can be lost while the other was read: then the claim goes again.
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
        let known = self.ledger.in_time(self.ledger.known_builds(self.source.id, &ids)).await?;
        let (known, unknown): (Vec<Uuid>, Vec<Uuid>) = ids.into_iter().partition(|id| known.contains_key(id));
        let mut claimless = self.ledger.in_time(self.ledger.builds_without_claim(self.source.id, &known)).await?;
        claimless.retain(|id| !self.claims.contains(id));
        let wanted = [unknown, claimless.clone()].concat();
        let (claims, mut builds) = self.build_events(reader, catalog, &wanted, &mut appended.unreadable).await?;
        builds.retain(|event| !matches!(&event.payload, Payload::Build(build) if claimless.contains(&build.build_id)));
        let late = builds.iter().filter(|build| self.is_late(build.time())).count();
        let sent = claims.iter().map(Event::to_message).collect();
        appended.report.claims += self.append(Topic::PrebuildClaims, sent, &mut appended.ends, |_, _| {}).await?;
        for id in known {
            self.builds.insert(id, unseen[&id], self.pass_number);
        }
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
        unreadable: &mut HashSet<Uuid>,
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
                Err(error) => {
                    unreadable.insert(build_id);
                    if self.unreadable.insert(build_id) {
                        tracing::error!(%error, "a build cannot be collected; nothing is claimed to be complete until it can");
                    }
                }
            }
        }
        let event_ids: Vec<String> = claims.iter().chain(&builds).map(Event::id).collect();
        let mut refused = self.ledger.in_time(self.ledger.refused_ids(deployment, &event_ids)).await?;
        if !refused.is_empty() {
            let again = claims.iter().chain(&builds).filter(|event| refused.contains(&event.id()));
            let again = again.map(|event| (event.id(), event.to_message())).collect();
            refused = self.ledger.in_time(self.ledger.refused_messages(deployment, &again)).await?;
        }
        claims.retain(|claim| !refused.contains(&claim.id()));
        builds.retain(|build| !refused.contains(&build.id()));
        Ok((claims, builds))
    }

    /// All usage that the pass meets, page by page.
    pub(super) async fn usage(&mut self, reader: &mut Reader, bounds: &Bounds, appended: &mut Appended) -> Result<(), CollectError> {
        let page = self.settings.page;
        let mut last: Option<UsageKey> = None;
        loop {
            self.lease.check()?;
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
        let known = self.ledger.in_time(self.ledger.known_usage(self.source.id, &ids)).await?;
        let (known, unknown): (Vec<String>, Vec<String>) = ids.into_iter().partition(|id| known.contains_key(id));
        for id in known {
            let at = unseen[&id];
            self.usage.insert(id, at, self.pass_number);
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let mut rows = reader.usage(&unknown).await?;
        let deployment = self.source.deployment_id;
        let mut refused = self.ledger.in_time(self.ledger.refused_ids(deployment, &unknown)).await?;
        if !refused.is_empty() {
            let again = rows.iter().filter(|row| refused.contains(&row.id));
            let again = again.map(|row| (row.id.clone(), events::usage(deployment, row.clone()))).collect();
            refused = self.ledger.in_time(self.ledger.refused_messages(deployment, &again)).await?;
        }
        rows.retain(|row| !refused.contains(&row.id));
        // A runtime row is dated by its hour and rightly comes later; the others are dated by the moment they are written.
        let late = rows.iter().filter(|row| row.event_type != "hb_agent_runtime_v1" && self.is_late(row.created_at)).count();
        let sent: Vec<(String, DateTime<Utc>)> = rows.iter().map(|row| (row.id.clone(), row.created_at)).collect();
        let messages = rows.into_iter().map(|row| events::usage(deployment, row)).collect();
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
        if matches!(&answer, Err(AppendError { cause: LogError::TooLarge { .. }, .. })) {
            self.settings.telemetry.too_large(topic);
        }
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

    fn is_late(&self, at: DateTime<Utc>) -> bool {
        self.claimed_until.is_some_and(|claimed| at < claimed)
    }
}

fn full(length: usize, page: i64) -> bool {
    i64::try_from(length).is_ok_and(|length| length >= page)
}

fn count(length: usize) -> i32 {
    i32::try_from(length).unwrap_or(i32::MAX)
}
