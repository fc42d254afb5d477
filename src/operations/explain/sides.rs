//! Compares an accepted event with coderd's row and with the record in the log.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{EventId, ExplainedPlace, ExplainedSource, LogState, SourceState};
use crate::coderd::{CoderdError, Database, Reader, Time};
use crate::collectors::events;
use crate::event::{self, Digest, Event, Payload, Topic, TopicPartition};
use crate::ledger::{KeptEvent, positions};
use crate::log::LogError;
use crate::operations::{OperationError, Operations};

/// coderd's row of an event, if this version can read it.
struct Row {
    digest: Result<Digest, String>,
    published_at: Option<DateTime<Utc>>,
}

impl Operations {
    /// coderd's current row. If coderd does not answer, the explanation continues without it.
    pub(super) async fn source_side(
        &self,
        id: &EventId,
        deployment: Option<Uuid>,
        accepted: Option<&Event>,
    ) -> ExplainedSource {
        let side = |state, detail: String| ExplainedSource { state, detail, published_at: None };
        let Some(database) = &self.coderd else {
            return side(
                SourceState::NotAsked,
                "not asked: no database of coderd is configured".to_owned(),
            );
        };
        let address = database.address();
        let row = match self.row(database, id, deployment).await {
            Ok(Ok(row)) => row,
            Ok(Err(why)) => return side(SourceState::NotAsked, why),
            Err(error) => return side(SourceState::NotAsked, format!("not asked: {error}")),
        };
        let Some(Row { digest, published_at }) = row else {
            return side(SourceState::Gone, format!("{address} has no such row"));
        };
        let (state, detail) = match (digest, accepted) {
            (Err(why), _) => (
                SourceState::Unreadable,
                format!("{address} has the row, which this version cannot read: {why}"),
            ),
            (Ok(_), None) => (
                SourceState::NotAccepted,
                format!("{address} has the row, and the ledger has accepted no event of it"),
            ),
            (Ok(digest), Some(event)) if digest == event.digest() => {
                (SourceState::Same, format!("{address} has the row, with the same digest"))
            }
            (Ok(_), Some(_)) => {
                (SourceState::Changed, format!("{address} has the row, with another digest"))
            }
        };
        ExplainedSource { state, detail, published_at }
    }

    /// The row, `None` if it does not exist, or the reason why coderd was not queried.
    async fn row(
        &self,
        database: &Database,
        id: &EventId,
        deployment: Option<Uuid>,
    ) -> Result<Result<Option<Row>, String>, CoderdError> {
        let mut reader = database.connect().await?;
        let own = match self.deployment {
            Some(own) => own,
            None => reader.deployment_id().await?,
        };
        if let Some(other) = deployment.filter(|deployment| *deployment != own) {
            return Ok(Err(format!(
                "not asked: {} is the database of {own}, not of {other}",
                database.address()
            )));
        }
        let row = match id.topic {
            Topic::AgentUsage => usage(&mut reader, own, &id.key).await?,
            Topic::WorkspaceBuilds | Topic::PrebuildClaims => build(&mut reader, own, id).await?,
        };
        reader.close().await;
        Ok(Ok(row))
    }

    /// Content of the event's place in the log.
    pub(super) async fn log_side(
        &self,
        row: &KeptEvent,
        event: &Event,
    ) -> Result<ExplainedPlace, OperationError> {
        let topic = event.topic();
        let batch = row.batch.as_ref();
        let (partition, generation) =
            (batch.and_then(|batch| batch.partition), batch.and_then(|batch| batch.generation));
        let (state, detail) = match (partition, generation) {
            (Some(partition), Some(generation)) => {
                let at = TopicPartition { topic, partition };
                let current =
                    self.ledger.run(async |conn| positions::generation(conn, at).await).await?;
                if current == generation {
                    self.record_at(at, row.log_offset, event).await
                } else {
                    (
                        LogState::Gone,
                        format!(
                            "read in generation {generation}; the partition is in generation {current}"
                        ),
                    )
                }
            }
            _ => (LogState::NotAsked, format!("batch {} is not there", row.batch_id)),
        };
        Ok(ExplainedPlace {
            topic: topic.name().to_owned(),
            partition,
            generation,
            offset: row.log_offset,
            state,
            detail,
        })
    }

    async fn record_at(
        &self,
        at: TopicPartition,
        offset: i64,
        event: &Event,
    ) -> (LogState, String) {
        match self.log.read(at, offset, 1).await {
            Ok(records) => match records.first().filter(|record| record.offset == offset) {
                None => (LogState::Gone, "the log holds no record there".to_owned()),
                Some(record) => match event::parse(&record.message) {
                    Ok(there)
                        if there.id() == event.id()
                            && there.deployment == event.deployment
                            && there.digest() == event.digest() =>
                    {
                        (
                            LogState::Same,
                            "the log holds the record, with the same digest".to_owned(),
                        )
                    }
                    _ => (LogState::Other, "another record has this offset now".to_owned()),
                },
            },
            Err(LogError::OutOfRange { start, end, .. }) => {
                (LogState::Gone, format!("the log holds offsets {start} to {end}"))
            }
            Err(error) => (LogState::NotAsked, format!("the log cannot be asked: {error}")),
        }
    }
}

async fn build(
    reader: &mut Reader,
    deployment: Uuid,
    id: &EventId,
) -> Result<Option<Row>, CoderdError> {
    let Ok(build_id) = id.key.parse() else { return Ok(None) };
    let catalog = reader.catalog().await?;
    let Some(row) = reader.builds(&catalog, &[build_id]).await?.pop() else { return Ok(None) };
    let build = match events::build(deployment, row) {
        Ok(build) => build,
        Err(why) => return Ok(Some(Row { digest: Err(why.to_string()), published_at: None })),
    };
    let payload = match id.topic {
        Topic::PrebuildClaims => events::claim(&build).map(|claim| Payload::Claim(Box::new(claim))),
        _ => Some(Payload::Build(Box::new(build))),
    };
    Ok(payload.map(|payload| Row {
        digest: Ok(Event { deployment, payload }.digest()),
        published_at: None,
    }))
}

async fn usage(
    reader: &mut Reader,
    deployment: Uuid,
    id: &str,
) -> Result<Option<Row>, CoderdError> {
    if !reader.catalog().await?.usage_events {
        return Ok(None);
    }
    let Some(row) = reader.usage(&[id.to_owned()]).await?.pop() else { return Ok(None) };
    let published_at = row.published_at.and_then(Time::instant);
    let digest = events::usage_digest(deployment, row).map_err(|error| error.to_string());
    Ok(Some(Row { digest, published_at }))
}
