//! Explanations: the source of one event, its effects and its publication.

mod effects;
mod explanation;
mod sides;

pub use explanation::{
    ExplainedBatch, ExplainedEvent, ExplainedPlace, ExplainedSeries, ExplainedSource, Explanation,
    Label, LicenseWindow, LogState, NoSeries, SourceState,
};

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ApiRequest, Operation, OperationError, Operations, Run};
use crate::event::{Event, MAX_ID_BYTES, Payload, Topic};
use crate::ledger::{
    KeptEvent, RefusalHistory, Sequence, corrected, event_history, kept, snapshots,
};
use crate::stages::{MetricsState, Stage as _};

/// Show the source, effects and publication of one event.
///
/// If coderd or the log cannot be queried, the answer reports that and shows the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// `workspace_build_completed:BUILD`, `prebuild_claimed:BUILD`, or coderd's own id of a usage
    /// event.
    // an empty id would be another path of the API
    #[arg(value_name = "EVENT_ID", value_parser = possible_id)]
    pub event_id: String,
    /// Deployment of the event. Needed only if several deployments have an event with this id.
    #[arg(long, value_name = "DEPLOYMENT_ID")]
    #[serde(default)]
    pub source: Option<Uuid>,
}

/// A parsed event id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventId {
    /// Topic of the event's records.
    pub topic: Topic,
    /// Id of a build, or of a usage event.
    pub key: String,
}

/// Checks whether an event can have this id.
fn possible_id(id: &str) -> Result<String, OperationError> {
    EventId::parse(id).map(|_| id.to_owned())
}

impl EventId {
    pub fn parse(id: &str) -> Result<EventId, OperationError> {
        let invalid = |message: String| Err(OperationError::Invalid { field: "event_id", message });
        if id.is_empty() {
            return invalid(
                "is empty: workspace_build_completed:BUILD, prebuild_claimed:BUILD or coderd's own id of a usage event is needed"
                    .to_owned(),
            );
        }
        if id.len() > MAX_ID_BYTES {
            return invalid(format!(
                "has {} bytes, and no event's id has more than {MAX_ID_BYTES}",
                id.len()
            ));
        }
        if id.contains('\0') {
            return invalid("holds a NUL character, as no event's id does".to_owned());
        }
        let prefixes = [
            ("workspace_build_completed:", Topic::WorkspaceBuilds),
            ("prebuild_claimed:", Topic::PrebuildClaims),
        ];
        for (prefix, topic) in prefixes {
            if let Some(rest) = id.strip_prefix(prefix) {
                return match rest.parse::<Uuid>() {
                    Ok(build) => Ok(EventId { topic, key: build.to_string() }),
                    Err(_) => invalid(format!(
                        "{rest:?} after {prefix} is not a build id; expected the UUID of coderd's workspace build"
                    )),
                };
            }
        }
        Ok(EventId { topic: Topic::AgentUsage, key: id.to_owned() })
    }

    /// The id in its canonical spelling.
    #[must_use]
    pub fn whole(&self) -> String {
        match self.topic {
            Topic::WorkspaceBuilds => format!("workspace_build_completed:{}", self.key),
            Topic::PrebuildClaims => format!("prebuild_claimed:{}", self.key),
            Topic::AgentUsage => self.key.clone(),
        }
    }
}

impl ApiRequest for ExplainRequest {
    type Answer = Explanation;
    const PATH: &'static str = "/api/v1/events/{event_id}/explain";
    const OLD_PATH: Option<&'static str> = Some("/api/v1/events/{event_id}/proof");
    const ANSWER: &'static str = "The explanation. 404: the event is not known.";
}

impl Operation for ExplainRequest {
    async fn run(&self, Run { operations, .. }: Run<'_>) -> Result<Explanation, OperationError> {
        let id = EventId::parse(&self.event_id)?;
        let head = operations.ledger.run(snapshots::head).await?;
        let mut kept = operations
            .ledger
            .run(async |conn| {
                kept::events_by_key(conn, id.topic, std::slice::from_ref(&id.key)).await
            })
            .await?;
        kept.retain(|row| self.source.is_none_or(|source| deployment_of(row) == Some(source)));
        let refusals = operations
            .ledger
            .run(async |conn| event_history::refusals(conn, &id.whole(), self.source).await)
            .await?;
        let deployment = one_deployment(&kept, &refusals)?.or(self.source);
        let kept = kept.pop();
        let accepted = kept.as_ref().map(|row| accepted_event(&id, row)).transpose()?;
        let content = match &kept {
            Some(row) => operations.content_of(row, &id, head.number).await?,
            None => None,
        };
        // an event that was corrected to nothing is compared as one that was not accepted
        let expected = content.as_ref().map_or(accepted, Option::as_ref);
        let source = operations.source_side(&id, deployment, expected).await;
        if kept.is_none()
            && refusals.is_empty()
            && source.state != SourceState::NotAccepted
            && source.state != SourceState::Unreadable
        {
            return Err(not_found(&id, &head, &source));
        }
        let accepted = match (&kept, accepted) {
            (Some(row), Some(event)) => {
                Some(operations.explained_event(row, event, &id, head).await?)
            }
            _ => None,
        };
        Ok(Explanation {
            event_id: id.whole(),
            deployment_id: deployment,
            as_of_sequence: head,
            source,
            accepted,
            refusals,
        })
    }
}

impl Operations {
    /// The content of an event at a sequence, if it was corrected up to it.
    async fn content_of(
        &self,
        row: &KeptEvent,
        id: &EventId,
        at: i64,
    ) -> Result<Option<Option<Event>>, OperationError> {
        let id = id.whole();
        let content =
            self.ledger.run(async |conn| corrected::content_at(conn, row.source_id, &id, at).await);
        Ok(content.await?)
    }

    /// The series and the license windows of an event, each by the content that they have.
    async fn explained_effects(
        &self,
        row: &KeptEvent,
        event: &Event,
        id: &EventId,
        at: i64,
    ) -> Result<(Vec<LicenseWindow>, (Vec<ExplainedSeries>, Vec<NoSeries>)), OperationError> {
        let rebuilt = self
            .ledger
            .run(async |conn| corrected::newest_rebuild(conn, MetricsState::NAME, at).await)
            .await?;
        let in_licenses = self.content_of(row, id, at).await?.unwrap_or(Some(event.clone()));
        let in_metrics = self.content_of(row, id, rebuilt).await?.unwrap_or(Some(event.clone()));
        let windows = match in_licenses {
            Some(event) => self.license_windows(row.source_id, &event).await?,
            None => Vec::new(),
        };
        let metrics = match in_metrics {
            Some(event) => self.metrics_of(&event, rebuilt).await?,
            None => (Vec::new(), Vec::new()),
        };
        Ok((windows, metrics))
    }

    async fn explained_event(
        &self,
        row: &KeptEvent,
        event: &Event,
        id: &EventId,
        head: Sequence,
    ) -> Result<ExplainedEvent, OperationError> {
        let (ledger, incarnation) = (&self.ledger, head.incarnation);
        let (license_windows, (metrics, not_in_metrics)) =
            self.explained_effects(row, event, id, head.number).await?;
        let event_id = id.whole();
        let corrections = ledger
            .run(async |conn| corrected::history(conn, row.source_id, &event_id).await)
            .await?;
        let sequence = row.batch.as_ref().and_then(|batch| batch.sequence);
        let usage = matches!(event.payload, Payload::Usage(_));
        let publication = if usage {
            ledger
                .run(async |conn| event_history::publication(conn, row.source_id, &row.key).await)
                .await?
        } else {
            None
        };
        let exports = match sequence.filter(|_| usage) {
            Some(sequence) => {
                ledger
                    .run(async |conn| {
                        event_history::exports(conn, row.source_id, &row.key, sequence).await
                    })
                    .await?
            }
            None => Vec::new(),
        };
        Ok(ExplainedEvent {
            event: event.to_structured(),
            digest: hex::encode(&row.digest),
            digest_holds: row.digest == event.digest(),
            log: self.log_side(row, event).await?,
            batch: ExplainedBatch {
                id: row.batch_id,
                kind: row.batch.as_ref().map(|batch| batch.kind),
                epoch: row.batch.as_ref().and_then(|batch| batch.epoch),
                sequence: sequence.map(|number| Sequence { incarnation, number }),
                recorded_at: row.batch.as_ref().map(|batch| batch.recorded_at),
            },
            corrections,
            license_windows,
            metrics,
            not_in_metrics,
            publication,
            exports,
        })
    }
}

fn deployment_of(row: &KeptEvent) -> Option<Uuid> {
    row.event.as_ref().ok().map(|event| event.deployment)
}

fn accepted_event<'a>(id: &EventId, row: &'a KeptEvent) -> Result<&'a Event, OperationError> {
    let unreadable = |why: &String| {
        anyhow::anyhow!(
            "the ledger's row of {} is not a valid event any more ({why}): run `tallyline audit --deep`",
            id.whole()
        )
    };
    Ok(row.event.as_ref().map_err(unreadable)?)
}

/// The only deployment with an event or a refusal of this id.
fn one_deployment(
    kept: &[KeptEvent],
    refusals: &[RefusalHistory],
) -> Result<Option<Uuid>, OperationError> {
    let mut deployments: BTreeSet<Uuid> = kept.iter().filter_map(deployment_of).collect();
    deployments.extend(refusals.iter().filter_map(|refusal| refusal.deployment_id));
    if deployments.len() > 1 {
        let all: Vec<String> = deployments.iter().map(Uuid::to_string).collect();
        return Err(OperationError::Invalid {
            field: "source",
            message: format!("several deployments have this id, name one of {}", all.join(", ")),
        });
    }
    Ok(deployments.pop_first())
}

fn not_found(id: &EventId, head: &Sequence, source: &ExplainedSource) -> OperationError {
    OperationError::NotFound(format!(
        "{} is known nowhere: not among the accepted events of {} nor the rejects up to ledger sequence {}; coderd: {}",
        id.whole(),
        id.topic,
        head,
        source.detail,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_says_which_table_holds_it() {
        let build = "0b3ad5a6-6b5e-4b0c-9d5c-0123456789ab";
        for (text, topic, key) in [
            (format!("workspace_build_completed:{build}"), Topic::WorkspaceBuilds, build),
            (format!("prebuild_claimed:{}", build.to_uppercase()), Topic::PrebuildClaims, build),
            (
                "hb_ai_seats_v1:2025-08-01".to_owned(),
                Topic::AgentUsage,
                "hb_ai_seats_v1:2025-08-01",
            ),
            (build.to_owned(), Topic::AgentUsage, build),
        ] {
            assert_eq!(EventId::parse(&text).unwrap(), EventId { topic, key: key.to_owned() });
        }
        assert!(EventId::parse(&"x".repeat(1024)).is_ok());
    }

    #[test]
    fn an_id_that_no_event_can_have_is_refused_by_its_name() {
        let long = "x".repeat(1025);
        for (id, words) in [
            ("", "is empty"),
            (long.as_str(), "has 1025 bytes"),
            ("a\0b", "NUL"),
            ("prebuild_claimed:7", "\"7\" after prebuild_claimed: is not a build id"),
        ] {
            let wrong = possible_id(id).unwrap_err();
            let named = matches!(&wrong, OperationError::Invalid { field: "event_id", message } if message.contains(words));
            assert!(named, "{wrong}");
        }
    }
}
