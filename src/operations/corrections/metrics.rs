//! The effect of a correction on metrics at the next rebuild.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::candidates::Candidate;
use super::effect::FamilyChange;
use crate::event::{Event, Payload, Topic};
use crate::ledger::{CorrectedEvent, NewCorrection, Source, corrections, first_starts, kept};
use crate::operations::{EventId, OperationError, Operations};
use crate::stages::effects_of;

/// Removed and added events of each family.
#[derive(Default)]
struct Changes(BTreeMap<String, (u64, u64)>);

impl Changes {
    fn remove(&mut self, family: impl Into<String>) {
        self.0.entry(family.into()).or_default().0 += 1;
    }

    fn add(&mut self, family: impl Into<String>) {
        self.0.entry(family.into()).or_default().1 += 1;
    }
}

impl Operations {
    /// The changes by family, with those of the builds that become first starts.
    pub(super) async fn metric_changes(
        &self,
        source: &Source,
        candidates: &[Candidate],
    ) -> Result<Vec<FamilyChange>, OperationError> {
        let corrected: Vec<CorrectedEvent<'_>> =
            candidates.iter().map(|one| one.new.corrected()).collect();
        let planned = self
            .ledger
            .run(async |conn| first_starts::planned(conn, source.id, &corrected).await)
            .await?;
        let mut changes = Changes::default();
        for NewCorrection { before, after, .. } in candidates.iter().map(|one| &one.new) {
            if let Some(event) = before {
                let series = self.metrics_of(event, i64::MAX).await?.0;
                series.into_iter().for_each(|one| changes.remove(one.family));
            }
            let Some(event) = after else { continue };
            match &event.payload {
                Payload::Build(build) if planned.contains_key(&build.workspace_id) => {
                    let is_first = planned[&build.workspace_id] == Some(build.build_id);
                    families(event, is_first, source).for_each(|family| changes.add(family));
                }
                _ => {
                    let series = self.metrics_of(event, i64::MAX).await?.0;
                    series.into_iter().for_each(|one| changes.add(one.family));
                }
            }
        }
        let is_corrected = |build: &Uuid| {
            let builds = candidates.iter().filter(|one| one.new.topic == Topic::WorkspaceBuilds);
            builds.filter_map(|one| one.new.build_id).any(|id| id == *build)
        };
        let successors = planned.into_values().flatten().filter(|build| !is_corrected(build));
        for event in self.builds(source, successors.collect()).await? {
            let others: Vec<&str> = families(&event, false, source).collect();
            let added = families(&event, true, source).filter(|family| !others.contains(family));
            added.for_each(|family| changes.add(family));
        }
        let change = |(family, (removed, added))| FamilyChange { family, removed, added };
        Ok(changes.0.into_iter().map(change).collect())
    }

    /// The current content of these builds.
    async fn builds(
        &self,
        source: &Source,
        builds: Vec<Uuid>,
    ) -> Result<Vec<Event>, OperationError> {
        let (topic, keys) = (Topic::WorkspaceBuilds, builds.iter().map(Uuid::to_string));
        let keys: Vec<String> = keys.collect();
        let ids: Vec<String> =
            keys.iter().map(|key| EventId { topic, key: key.clone() }.whole()).collect();
        let kept =
            self.ledger.run(async |conn| kept::events_by_key(conn, topic, &keys).await).await?;
        let mut newest =
            self.ledger.run(async |conn| corrections::newest(conn, source.id, &ids).await).await?;
        let events = kept.into_iter().filter(|kept| kept.source_id == source.id);
        let accepted = events.filter_map(|kept| kept.event.ok());
        Ok(accepted.filter_map(|event| newest.remove(&event.id()).unwrap_or(Some(event))).collect())
    }
}

/// The families that the event adds to, if its workspace has it as first start or not.
fn families(
    event: &Event,
    is_first: bool,
    source: &Source,
) -> impl Iterator<Item = &'static str> + use<> {
    let mut event = event.clone();
    if let Payload::Build(build) = &mut event.payload {
        build.first_successful_start &= is_first;
    }
    effects_of(&event, source.introduced_at).added.into_iter().map(|effect| effect.family())
}
