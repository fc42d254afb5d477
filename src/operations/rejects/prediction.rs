//! Predicts the disposition of a record that is read now.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::consumer;
use crate::event::{Digest, Message, Topic, Traces};
use crate::ledger::{Disposition, Refusal, corrected, rejects, sources};
use crate::log::Record;
use crate::operations::{OperationError, Operations};

/// Predicted outcome of a record that is read now. Errors of PostgreSQL itself cannot be predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PredictedDisposition {
    Accepted,
    /// An equal event is already accepted: nothing would change, and nothing is appended.
    Duplicate,
    /// Another event with this id is accepted, and remains.
    Conflict,
    /// Not a valid event.
    Rejected,
    /// Usage of a type that this version does not know.
    Held,
}

/// The predicted outcome of a message, with the message and topic to append.
pub(super) struct Prediction {
    pub disposition: PredictedDisposition,
    pub reason: Option<String>,
    pub event_id: Option<String>,
    /// Deployment and topic of the event; `None` if the message is not a valid event.
    pub event: Option<(Uuid, Topic)>,
    pub message: Message,
}

/// Events that one call predicts to be new.
pub(super) type News = HashMap<(Uuid, String), Digest>;

impl Operations {
    /// Predicts the outcome of a message that is read now. `news` contains the events that this
    /// call predicted to be new.
    pub(super) async fn predict_disposition(
        &self,
        message: &Message,
        news: &mut News,
    ) -> Result<Prediction, OperationError> {
        let record =
            Record { offset: 0, timestamp: self.ledger.clock.now(), message: message.clone() };
        let mut message = message.clone();
        let event = match consumer::read(record).event {
            Ok(event) => event,
            Err(refusal) => {
                let disposition = if refusal.disposition == Disposition::Held {
                    PredictedDisposition::Held
                } else {
                    PredictedDisposition::Rejected
                };
                let event_id = Traces::of(&message).id;
                return Ok(Prediction {
                    disposition,
                    reason: Some(refusal.detail),
                    event_id,
                    event: None,
                    message,
                });
            }
        };
        if self.ledger.run(async |conn| sources::get(conn, event.deployment).await).await?.is_none()
        {
            let reason = Some(Refusal::unregistered(event.deployment).detail);
            return Ok(Prediction {
                disposition: PredictedDisposition::Held,
                reason,
                event_id: Some(event.id()),
                event: None,
                message,
            });
        }
        // one key is one partition, regardless of the producer
        message.key = Some(event.key().into_bytes());
        let (id, digest) = (event.id(), event.digest());
        let accepted = self
            .ledger
            .run(async |conn| rejects::accepted(conn, event.deployment, &id).await)
            .await?
            .map(|(_, digest)| digest);
        let mut known = accepted.or_else(|| news.get(&(event.deployment, id.clone())).copied());
        if accepted.is_some_and(|accepted| accepted != digest) {
            let ids = [id.clone()];
            let contents =
                self.ledger.run(async |conn| corrected::contents(conn, &ids).await).await?;
            if contents.contains(&(event.deployment, id.clone(), digest)) {
                known = Some(digest);
            }
        }
        let (disposition, reason) = match known {
            None => {
                news.insert((event.deployment, id.clone()), digest);
                (PredictedDisposition::Accepted, None)
            }
            Some(known) if known == digest => (
                PredictedDisposition::Duplicate,
                Some(format!("{id} is accepted already, with the same content")),
            ),
            Some(_) => (
                PredictedDisposition::Conflict,
                Some(format!("{id} is accepted with other content; the accepted event remains")),
            ),
        };
        Ok(Prediction {
            disposition,
            reason,
            event_id: Some(id),
            event: Some((event.deployment, event.topic())),
            message,
        })
    }
}
