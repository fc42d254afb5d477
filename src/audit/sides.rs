//! Both sides of one source's books: coderd's database and the ledger.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::joint::RECENT;
use crate::coderd::{Catalog, CoderdError, Database, Reader};
use crate::collectors::events::{self, InvalidRow};
use crate::event::{Digest, Event, ParseError, Payload, Topic, build_of};
use crate::ledger::{Ledger, Source, identity, known};

/// The topics of a build's events.
pub(super) const BUILD_TOPICS: [Topic; 2] = [Topic::WorkspaceBuilds, Topic::PrebuildClaims];
/// Prefixes of the ids of a build's events.
const EVENTS: [&str; 2] = ["workspace_build_completed", "prebuild_claimed"];

/// Digests of a build and of its prebuild claim.
pub(super) type BuildDigests = [Option<Digest>; 2];
const NOTHING: BuildDigests = [None, None];
/// Digest for a row that is not a valid event and is among the rejects.
const NO_EVENT: Digest = [0; 32];

/// 1 if the differences were reread after a later collector pass.
pub(super) const READ_AGAIN: &str = "read_again_after_a_later_pass";

/// Ids that differ, by table.
#[derive(Default, serde::Serialize, serde::Deserialize)]
pub(super) struct Suspects {
    pub builds: BTreeSet<Uuid>,
    pub usage: BTreeSet<String>,
}

impl Suspects {
    pub fn len(&self) -> usize {
        self.builds.len() + self.usage.len()
    }

    /// Adds the row of an event.
    pub fn add(&mut self, event_id: &str) {
        match build_of(event_id) {
            Some(build) => drop(self.builds.insert(build)),
            None => drop(self.usage.insert(event_id.to_owned())),
        }
    }

    /// The rows without those of these events.
    pub fn without(mut self, events: &BTreeSet<String>) -> Self {
        self.builds.retain(|build| event_ids(build).iter().any(|id| !events.contains(id)));
        self.usage.retain(|id| !events.contains(id));
        self
    }

    /// The ids of all events of these rows.
    pub fn event_ids(&self) -> impl Iterator<Item = String> {
        self.builds.iter().flat_map(event_ids).chain(self.usage.iter().cloned())
    }
}

pub(super) struct Sides<'a> {
    pub ledger: &'a Ledger,
    pub source: Source,
    pub reader: Reader,
    pub catalog: Catalog,
    /// Suspects that were resubmitted from the rejects before the awaited pass began.
    pub passed: HashSet<String>,
}

/// The possible event ids of a build.
pub(super) fn event_ids(id: &Uuid) -> [String; 2] {
    EVENTS.map(|event| format!("{event}:{id}"))
}

impl<'a> Sides<'a> {
    pub(super) async fn open(
        ledger: &'a Ledger,
        database: &Database,
        source: Source,
    ) -> anyhow::Result<Self> {
        let mut reader = database.connect().await.context("reading coderd's database")?;
        let catalog = reader.catalog().await.context("reading coderd's database")?;
        Ok(Sides { ledger, source, reader, catalog, passed: HashSet::new() })
    }

    /// Refuses a coderd that does not belong to this source: its rows are not a side of these
    /// books. A coderd that does not report its identity can be compared only while the source is
    /// not bound.
    pub(super) async fn identify(&mut self) -> anyhow::Result<()> {
        let source_id = self.source.deployment_id;
        let facts = self.reader.identity_facts().await.context("reading coderd's database")?;
        if let Some(refusal) = self
            .ledger
            .run(async |conn| identity::refusal_of(conn, source_id, (&facts).into()).await)
            .await?
        {
            return Err(refusal.into());
        }
        match facts.problem {
            Some(problem)
                if self
                    .ledger
                    .run(async |conn| identity::is_bound(conn, source_id).await)
                    .await? =>
            {
                Err(CoderdError::UnknownIdentity(problem).into())
            }
            _ => Ok(()),
        }
    }

    /// The instant from which usage can still be published.
    pub(super) fn recent(&self) -> DateTime<Utc> {
        self.ledger.clock.now() - RECENT
    }

    pub(super) async fn ledger_digests(
        &self,
        ids: &[Uuid],
    ) -> anyhow::Result<HashMap<Uuid, BuildDigests>> {
        let mut builds =
            self.ledger.run(async |conn| known::builds(conn, self.source.id, ids).await).await?;
        let mut claims =
            self.ledger.run(async |conn| known::claims(conn, self.source.id, ids).await).await?;
        let known = ids.iter().map(|id| (*id, [builds.remove(id), claims.remove(id)]));
        Ok(known.filter(|(_, digests)| *digests != NOTHING).collect())
    }

    /// The digests of these rows in coderd; None for a row that this version cannot read.
    pub(super) async fn source_digests(
        &mut self,
        ids: &[Uuid],
    ) -> anyhow::Result<HashMap<Uuid, Option<BuildDigests>>> {
        let mut digests = HashMap::with_capacity(ids.len());
        for row in self.reader.builds(&self.catalog, ids).await? {
            let id = row.build_id;
            let read = match events::build(self.source.deployment_id, row) {
                Ok(build) => {
                    let claim = events::claim(&build)
                        .map(|claim| self.digest(Payload::Claim(Box::new(claim))));
                    Some([Some(self.digest(Payload::Build(Box::new(build)))), claim])
                }
                Err(InvalidRow::Time { .. }) => Some([Some(NO_EVENT), None]),
                Err(InvalidRow::UnknownWord { .. }) => None,
            };
            digests.insert(id, read);
        }
        Ok(digests)
    }

    fn digest(&self, payload: Payload) -> Digest {
        Event { deployment: self.source.deployment_id, payload }.digest()
    }

    /// The digests of these usage rows; an error for a row that this version cannot read as an
    /// event.
    pub(super) async fn source_usage_digests(
        &mut self,
        ids: &[String],
    ) -> anyhow::Result<HashMap<String, Result<Digest, ParseError>>> {
        let deployment = self.source.deployment_id;
        let rows = self.reader.usage(ids).await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.id.clone(), events::usage_digest(deployment, row)))
            .collect())
    }
}
