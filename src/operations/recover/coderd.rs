//! Recovers from a coderd database restored to an earlier time. The ledger keeps what coderd lost;
//! coderd may repeat its work.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;
use uuid::Uuid;

use super::super::operation::counting;
use super::super::{OperationError, Operations, Progress};
use crate::coderd::{Catalog, Reader};
use crate::collectors::events;
use crate::ledger::{
    Ledger, NewAct, PublicationState, Source, books, confirmed, identity, known, losses, sources,
};

/// Ids compared in one query.
const PAGE: i64 = 2_000;

/// Effect of a recovery for coderd's database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoderdEffect {
    /// Id of the deployment.
    pub deployment_id: Uuid,
    /// Confirmed usage that coderd no longer has, by type. It stays counted, and the audit would
    /// list it as `source_gone`.
    pub lost: Vec<LostEvents>,
    /// Confirmed builds and claims that coderd no longer has. They stay counted. They need no
    /// recovery, because coderd removes old builds by itself.
    pub gone_builds: i64,
    /// Events that coderd does not have and that were never confirmed. A recovery does not change
    /// them; the audit lists their ids.
    pub unconfirmed: i64,
    /// Usage that would be listed as lost: events that coderd no longer has or whose id it used
    /// again, if not listed yet.
    pub to_list: i64,
    /// SHA-256 of the ids of that usage, in hexadecimal.
    pub ids_sha256: String,
    /// Usage ids for which coderd now has other content than the accepted event. The accepted event
    /// remains; the other content is not counted. The audit would list them as `source_changed`.
    pub ids_used_again: i64,
    /// Pending events whose id coderd uses for other content. They are held back from the vendor
    /// until the execution; then mode `sole` sends them as they were accepted.
    pub ids_used_again_pending: i64,
    /// Records that were refused as conflicts with accepted events.
    pub conflicts: i64,
    /// Usage that Tallyline published and coderd has no publish mark for. This is expected in mode
    /// `sole`.
    pub published_here_without_mark: i64,
    /// Usage that coderd had published and that has no publish mark now: coderd will publish it
    /// again. The vendor remembers its id for 34 days and bills it once.
    pub published_by_coderd_without_mark: i64,
}

/// Confirmed usage of one type that coderd no longer has, if not listed as lost yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LostEvents {
    /// Usage type.
    pub event_type: String,
    /// Number of events.
    pub events: i64,
    /// Sum of their quantities in the type's unit, in decimal.
    pub units: Option<String>,
    /// Lost events that are already published.
    pub published: i64,
    /// Lost events that are still pending: mode `sole` would send them although coderd has no row.
    pub pending: i64,
}

impl CoderdEffect {
    pub(super) fn nothing(&self) -> Option<String> {
        let nothing = "coderd has all confirmed usage, except usage already recorded as lost: there is nothing to recover";
        (self.to_list == 0).then(|| nothing.to_owned())
    }

    pub(super) fn changes(&self) -> Value {
        json!({ "deployment": self.deployment_id, "ids": self.ids_sha256 })
    }
}

struct Comparison<'a> {
    ledger: &'a Ledger,
    source: Source,
    reader: Reader,
    catalog: Catalog,
    effect: CoderdEffect,
    lost: BTreeMap<&'static str, (LostEvents, u128)>,
    ids: Vec<String>,
}

/// Compares all ids of the ledger with coderd's rows. Also returns the lost ids.
pub(super) async fn predict(
    operations: &Operations,
    progress: Progress<'_>,
    stop: &CancellationToken,
) -> Result<(CoderdEffect, Vec<String>), OperationError> {
    let mut comparison = Comparison::open(operations).await?;
    let all = operations
        .ledger
        .run(async |conn| losses::source_events(conn, comparison.source.id).await)
        .await?;
    let total = u64::try_from(all).unwrap_or_default();
    let progress = counting(("comparing", "records"), total, progress);
    comparison.builds(&progress, stop).await?;
    if comparison.catalog.usage_events {
        comparison.usage(&progress, stop).await?;
    }
    Ok(comparison.end().await)
}

pub(super) async fn execute(
    operations: &Operations,
    effect: &CoderdEffect,
    ids: &[String],
    act: &NewAct<'_>,
    hash: &str,
) -> Result<bool, OperationError> {
    let source = operations
        .ledger
        .run(async |conn| sources::get(conn, effect.deployment_id).await)
        .await?
        .ok_or_else(OperationError::plan_changed)?;
    Ok(operations
        .ledger
        .run(async |conn| {
            losses::record(conn, source.id, ids, act, hash, operations.ledger.clock.now()).await
        })
        .await?)
}

impl<'a> Comparison<'a> {
    async fn open(operations: &'a Operations) -> Result<Self, OperationError> {
        let Some(database) = &operations.coderd else {
            let unset = "coderd's database is not known here, source.coderd_url is not set: use a process that has it";
            return Err(OperationError::Forbidden(unset.to_owned()));
        };
        let mut reader = database.connect().await?;
        let deployment_id = match operations.deployment {
            Some(id) => id,
            None => reader.deployment_id().await?,
        };
        let unknown =
            || OperationError::NotFound(format!("the ledger knows no deployment {deployment_id}"));
        let source = operations
            .ledger
            .run(async |conn| sources::get(conn, deployment_id).await)
            .await?
            .ok_or_else(unknown)?;
        let facts = reader.identity_facts().await?;
        if let Some(refusal) = operations
            .ledger
            .run(async |conn| identity::refusal_of(conn, deployment_id, (&facts).into()).await)
            .await?
        {
            return Err(OperationError::Forbidden(refusal.to_string()));
        }
        let catalog = reader.catalog().await?;
        let conflicts = operations
            .ledger
            .run(async |conn| losses::usage_conflicts(conn, deployment_id).await)
            .await?;
        let effect = CoderdEffect { deployment_id, conflicts, ..CoderdEffect::default() };
        Ok(Comparison {
            ledger: &operations.ledger,
            source,
            reader,
            catalog,
            effect,
            lost: BTreeMap::new(),
            ids: Vec::new(),
        })
    }

    async fn builds(
        &mut self,
        progress: &(dyn Fn(u64) + Sync),
        stop: &CancellationToken,
    ) -> Result<(), OperationError> {
        let mut after = Uuid::nil();
        loop {
            let ids = self
                .ledger
                .run(async |conn| books::build_ids(conn, self.source.id, after, PAGE).await)
                .await?;
            let Some(last) = ids.last().copied() else { return Ok(()) };
            if stop.is_cancelled() {
                return Err(OperationError::Interrupted);
            }
            after = last;
            let there: HashSet<Uuid> = self
                .reader
                .builds(&self.catalog, &ids)
                .await?
                .into_iter()
                .map(|row| row.build_id)
                .collect();
            let gone: Vec<Uuid> = ids.iter().copied().filter(|id| !there.contains(id)).collect();
            self.gone_builds(&gone).await?;
            progress(ids.len() as u64);
        }
    }

    async fn gone_builds(&mut self, gone: &[Uuid]) -> Result<(), OperationError> {
        if gone.is_empty() {
            return Ok(());
        }
        let events = self
            .ledger
            .run(async |conn| confirmed::builds(conn, self.source.id, gone).await)
            .await?;
        for is_confirmed in events.into_values().flatten().flatten() {
            let count = if is_confirmed {
                &mut self.effect.gone_builds
            } else {
                &mut self.effect.unconfirmed
            };
            *count += 1;
        }
        Ok(())
    }

    async fn usage(
        &mut self,
        progress: &(dyn Fn(u64) + Sync),
        stop: &CancellationToken,
    ) -> Result<(), OperationError> {
        let mut after = String::new();
        loop {
            let ids = self
                .ledger
                .run(async |conn| books::usage_ids(conn, self.source.id, &after, PAGE).await)
                .await?;
            let Some(last) = ids.last().cloned() else { return Ok(()) };
            if stop.is_cancelled() {
                return Err(OperationError::Interrupted);
            }
            after = last;
            self.usage_page(&ids).await?;
            progress(ids.len() as u64);
        }
    }

    async fn usage_page(&mut self, ids: &[String]) -> Result<(), OperationError> {
        let outcomes = self
            .ledger
            .run(async |conn| losses::usage_outcomes(conn, self.source.id, ids).await)
            .await?;
        let accepted =
            self.ledger.run(async |conn| known::usage(conn, self.source.id, ids).await).await?;
        let listed =
            self.ledger.run(async |conn| losses::lost_ids(conn, self.source.id, ids).await).await?;
        let confirmed =
            self.ledger.run(async |conn| confirmed::usage(conn, self.source.id, ids).await).await?;
        let rows: BTreeMap<String, _> =
            self.reader.usage(ids).await?.into_iter().map(|row| (row.id.clone(), row)).collect();
        for (id, outcome) in outcomes {
            match rows.get(&id) {
                None if listed.contains(&id) => {}
                None if !confirmed.contains(&id) => self.effect.unconfirmed += 1,
                None => {
                    let (lost, units) = self.lost_event(outcome.event_type.as_str());
                    lost.events += 1;
                    lost.published += i64::from(matches!(
                        outcome.state,
                        PublicationState::Published | PublicationState::NotOurs
                    ));
                    lost.pending += i64::from(outcome.state == PublicationState::Pending);
                    *units += outcome.quantity.parse::<u128>().unwrap_or_default();
                    self.ids.push(id);
                }
                Some(row) => {
                    let unmarked = row.published_at.is_none();
                    self.effect.published_here_without_mark +=
                        i64::from(unmarked && outcome.state == PublicationState::Published);
                    self.effect.published_by_coderd_without_mark +=
                        i64::from(unmarked && outcome.state == PublicationState::NotOurs);
                    let digest = events::usage_digest(self.source.deployment_id, row.clone());
                    let same =
                        digest.as_ref().is_ok_and(|digest| accepted.get(&id) == Some(digest));
                    self.effect.ids_used_again += i64::from(!same);
                    // coderd no longer has the accepted content
                    if digest.is_ok() && !same && confirmed.contains(&id) && !listed.contains(&id) {
                        self.effect.ids_used_again_pending +=
                            i64::from(unmarked && outcome.state == PublicationState::Pending);
                        self.ids.push(id);
                    }
                }
            }
        }
        Ok(())
    }

    fn lost_event(&mut self, event_type: &'static str) -> &mut (LostEvents, u128) {
        self.lost.entry(event_type).or_insert_with(|| {
            (LostEvents { event_type: event_type.to_owned(), ..LostEvents::default() }, 0)
        })
    }

    async fn end(mut self) -> (CoderdEffect, Vec<String>) {
        self.reader.close().await;
        self.ids.sort_unstable();
        self.effect.to_list = i64::try_from(self.ids.len()).unwrap_or(i64::MAX);
        let mut hash = Sha256::new();
        for id in &self.ids {
            hash.update((id.len() as u64).to_be_bytes());
            hash.update(id);
        }
        self.effect.ids_sha256 = hex::encode(hash.finalize());
        self.effect.lost = self
            .lost
            .into_values()
            .map(|(lost, units)| LostEvents {
                units: (units > 0).then(|| units.to_string()),
                ..lost
            })
            .collect();
        (self.effect, self.ids)
    }
}
