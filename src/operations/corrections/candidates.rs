//! The events to correct: as they are in the ledger, and by coderd's rows.

use std::collections::{BTreeSet, HashMap, HashSet};

use uuid::Uuid;

use crate::coderd::{CoderdError, Database, Reader, UsageRow};
use crate::collectors::events;
use crate::event::{self, Event, Payload, PublishMarks, Topic};
use crate::ledger::{
    KeptEvent, NewCorrection, Source, confirmed, corrections, identity, kept, sources,
};
use crate::operations::{EventId, OperationError, Operations};

/// An event to correct.
pub(super) struct Candidate {
    pub new: NewCorrection,
    /// Whether coderd is known to have had the event as it is in the ledger.
    pub confirmed: bool,
}

impl Candidate {
    /// Checks that the event differs from coderd's row and that correcting it is allowed. coderd
    /// rewrites the fields outside the digest, so an event that differs only there may be true.
    pub(super) fn check(&self, allow_confirmed: bool) -> Result<(), OperationError> {
        let NewCorrection { event_id, before, after, .. } = &self.new;
        let differs = self.differs();
        let digest = |event: &Option<Event>| event.as_ref().map(Event::digest);
        let rewritten = format!(
            "differs from coderd's row only in {}, which coderd may have rewritten since: correct it only if it is forged, with --allow-confirmed",
            differs.join(", ")
        );
        let refusal = match (before, after) {
            (None, None) => "is corrected already: coderd does not have it",
            (Some(_), Some(_)) if differs.is_empty() => {
                "coderd has the same row: it is a true event"
            }
            _ if allow_confirmed => return Ok(()),
            _ if digest(before) == digest(after) => &rewritten,
            (Some(_), _) if self.confirmed => {
                "a signature or an audit has confirmed that coderd had it, so it remains counted: correct it only if a signing key was stolen, with --allow-confirmed"
            }
            _ => return Ok(()),
        };
        Err(OperationError::Forbidden(format!("{event_id}: {refusal}")))
    }

    /// The fields that differ from coderd's row. coderd's publish marks are not part of usage.
    pub(super) fn differs(&self) -> Vec<String> {
        let (Some(before), Some(after)) = (&self.new.before, &self.new.after) else {
            return Vec::new();
        };
        let [before, after] = [fields(before), fields(after)];
        let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        let differ = names.into_iter().filter(|name| before.get(*name) != after.get(*name));
        differ.cloned().collect()
    }
}

/// The attributes and data of an event, by name, without coderd's publish marks.
fn fields(event: &Event) -> serde_json::Map<String, serde_json::Value> {
    let mut event = event.clone();
    if let Payload::Usage(usage) = &mut event.payload {
        usage.marks = PublishMarks::default();
    }
    let serde_json::Value::Object(mut fields) = event.to_structured() else {
        return serde_json::Map::new();
    };
    if let Some(serde_json::Value::Object(data)) = fields.remove("data") {
        fields.extend(data);
    }
    fields
}

impl Operations {
    /// The source of the configured coderd, and its events of these ids.
    pub(super) async fn correction_candidates(
        &self,
        ids: &[EventId],
        named: Option<Uuid>,
    ) -> Result<(Source, Vec<Candidate>), OperationError> {
        let Some(database) = &self.coderd else {
            let unset = "coderd's database is not known here, source.coderd_url is not set: use a process that has it";
            return Err(OperationError::Forbidden(unset.to_owned()));
        };
        let mut reader = database.connect().await?;
        let source = self.source_of(&mut reader, database, named).await?;
        let mut accepted = self.accepted(&source, ids, database).await?;
        let mut rows = coderd_events(&mut reader, source.deployment_id, ids).await?;
        reader.close().await;
        let names: Vec<String> = ids.iter().map(EventId::whole).collect();
        let newest = self
            .ledger
            .run(async |conn| corrections::newest(conn, source.id, &names).await)
            .await?;
        let publications = self
            .ledger
            .run(async |conn| corrections::publications(conn, source.id, &names).await)
            .await?;
        let confirmed = self.confirmed(source.id, ids).await?;
        let mut candidates = Vec::new();
        for (id, event_id) in ids.iter().zip(names) {
            let Some((accepted_batch_id, accepted)) = accepted.remove(&event_id) else { continue };
            candidates.push(Candidate {
                confirmed: confirmed.contains(&event_id),
                new: NewCorrection {
                    topic: id.topic,
                    build_id: id.build(),
                    accepted_batch_id,
                    before: newest.get(&event_id).cloned().unwrap_or(Some(accepted)),
                    after: rows.remove(&event_id).transpose()?,
                    publication: publications.get(&event_id).copied(),
                    event_id,
                },
            });
        }
        Ok((source, candidates))
    }

    /// The source that this coderd belongs to.
    async fn source_of(
        &self,
        reader: &mut Reader,
        database: &Database,
        named: Option<Uuid>,
    ) -> Result<Source, OperationError> {
        let own = match self.deployment {
            Some(own) => own,
            None => reader.deployment_id().await?,
        };
        if let Some(other) = named.filter(|named| *named != own) {
            return Err(OperationError::Forbidden(format!(
                "source {other}: {} is the database of {own}, and its rows say nothing about another source",
                database.address()
            )));
        }
        let facts = reader.identity_facts().await?;
        let refusal = self
            .ledger
            .run(async |conn| identity::refusal_of(conn, own, (&facts).into()).await)
            .await?;
        let is_bound = self.ledger.run(async |conn| identity::is_bound(conn, own).await).await?;
        if let Some(refusal) = refusal {
            return Err(OperationError::Forbidden(refusal.to_string()));
        }
        if let Some(problem) = facts.problem.filter(|_| is_bound) {
            return Err(CoderdError::UnknownIdentity(problem).into());
        }
        let unknown =
            || OperationError::NotFound(format!("the ledger does not know deployment {own}"));
        self.ledger.run(async |conn| sources::get(conn, own).await).await?.ok_or_else(unknown)
    }

    /// The accepted events of the source, with their batches, by id.
    async fn accepted(
        &self,
        source: &Source,
        ids: &[EventId],
        database: &Database,
    ) -> Result<HashMap<String, (i64, Event)>, OperationError> {
        let (mut accepted, mut others) = (HashMap::new(), HashMap::new());
        for topic in Topic::ALL {
            let keys = keys_of(ids, topic);
            let rows = self.ledger.run(async |conn| kept::events_by_key(conn, topic, &keys).await);
            for KeptEvent { source_id, key, event, batch_id, .. } in rows.await? {
                let event_id = EventId { topic, key }.whole();
                let event = event.map_err(|why| {
                    anyhow::anyhow!("the ledger's row of {event_id} is not a valid event any more ({why}): run `tallyline audit --deep`")
                })?;
                if source_id == source.id {
                    accepted.insert(event_id, (batch_id, event));
                } else {
                    others.insert(event_id, event.deployment);
                }
            }
        }
        let missing = ids.iter().map(EventId::whole).find(|id| !accepted.contains_key(id));
        if let Some(event_id) = missing {
            return Err(match others.get(&event_id) {
                Some(other) => OperationError::Forbidden(format!(
                    "{event_id}: belongs to source {other}, but {} is the database of {}",
                    database.address(),
                    source.deployment_id
                )),
                None => OperationError::NotFound(format!(
                    "{event_id}: the ledger has not accepted an event of this id from source {}",
                    source.deployment_id
                )),
            });
        }
        Ok(accepted)
    }

    /// The confirmed events among these.
    async fn confirmed(
        &self,
        source_id: i16,
        ids: &[EventId],
    ) -> Result<HashSet<String>, OperationError> {
        let builds: Vec<Uuid> = ids.iter().filter_map(EventId::build).collect();
        let usage = keys_of(ids, Topic::AgentUsage);
        let builds =
            self.ledger.run(async |conn| confirmed::builds(conn, source_id, &builds).await).await?;
        let usage =
            self.ledger.run(async |conn| confirmed::usage(conn, source_id, &usage).await).await?;
        let is_confirmed = |id: &EventId| match (id.topic, id.build()) {
            (topic, Some(build)) => builds.get(&build).is_some_and(|events| {
                events[usize::from(topic == Topic::PrebuildClaims)] == Some(true)
            }),
            (_, None) => usage.contains(&id.key),
        };
        Ok(ids.iter().filter(|id| is_confirmed(id)).map(EventId::whole).collect())
    }
}

impl EventId {
    /// The build of a build or claim.
    fn build(&self) -> Option<Uuid> {
        match self.topic {
            Topic::WorkspaceBuilds | Topic::PrebuildClaims => self.key.parse().ok(),
            Topic::AgentUsage => None,
        }
    }
}

fn keys_of(ids: &[EventId], topic: Topic) -> Vec<String> {
    ids.iter().filter(|id| id.topic == topic).map(|id| id.key.clone()).collect()
}

type Rows = HashMap<String, Result<Event, OperationError>>;

/// coderd's rows as events, by id. A row that is not a valid event is an error. coderd's publish
/// marks are left out: they are not part of an event's content.
async fn coderd_events(
    reader: &mut Reader,
    deployment: Uuid,
    ids: &[EventId],
) -> Result<Rows, OperationError> {
    let mut found = Rows::new();
    let catalog = reader.catalog().await?;
    let builds: Vec<Uuid> =
        ids.iter().filter_map(EventId::build).collect::<BTreeSet<_>>().into_iter().collect();
    for row in reader.builds(&catalog, &builds).await? {
        let build_id = row.build_id;
        let [build, claim] = event::ids_of_build(build_id);
        match events::build(deployment, row) {
            Ok(row) => {
                if let Some(row) = events::claim(&row) {
                    let payload = Payload::Claim(Box::new(row));
                    found.insert(claim, Ok(Event { deployment, payload }));
                }
                let payload = Payload::Build(Box::new(row));
                found.insert(build, Ok(Event { deployment, payload }));
            }
            Err(why) => {
                found.insert(claim.clone(), Err(unreadable(&claim, &why)));
                found.insert(build.clone(), Err(unreadable(&build, &why)));
            }
        }
    }
    let usage = keys_of(ids, Topic::AgentUsage);
    if !usage.is_empty() && !catalog.usage_events {
        let message = "coderd's database has no table usage_events, or its role cannot see it: usage cannot be compared";
        return Err(OperationError::Forbidden(message.to_owned()));
    }
    if !usage.is_empty() {
        for row in reader.usage(&usage).await? {
            let id = row.id.clone();
            let row = UsageRow {
                publish_started_at: None,
                published_at: None,
                failure_message: None,
                ..row
            };
            let event = event::parse(&events::usage(deployment, row));
            found.insert(id.clone(), event.map_err(|why| unreadable(&id, &why)));
        }
    }
    Ok(found)
}

fn unreadable(event_id: &str, why: &impl std::fmt::Display) -> OperationError {
    OperationError::Forbidden(format!(
        "{event_id}: coderd's row is not a valid event of this version: {why}"
    ))
}
