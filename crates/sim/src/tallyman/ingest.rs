//! `POST /api/v1/events/ingest`: one request through headers, body, events and switches to its
//! answer.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::books::{Delivery, Outcome};
use super::connection::Scissors;
use super::state::{ServerState, Shared};
use super::switches::{Behaviour, CutMoment};
use super::wire::{self, Accepted, Answer, Received, Rejected};

/// Older events are refused permanently.
const MAX_AGE: TimeDelta = TimeDelta::days(30);

/// A longer body is refused. A hundred events fit many times.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;

pub async fn ingest(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(scissors): ConnectInfo<Scissors>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let _in_flight = InFlight::enter(&shared);
    let (request, latency, cut) = {
        let mut state = shared.state();
        let request = state.books.next_request();
        (request, state.running.switches().latency_ms, state.running.cut(request))
    };
    if latency > 0 {
        let wait = tokio::time::sleep(Duration::from_millis(latency));
        // A stop does not wait for the latency.
        shared.stop.run_until_cancelled(wait).await;
    }
    let response = if cut == Some(CutMoment::BeforeReading) {
        match shared.state().books.record(request, Vec::new()) {
            Ok(()) => StatusCode::OK.into_response(),
            Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
        }
    } else {
        answer(&shared, request, cut.is_some(), &headers, body).await
    };
    if cut.is_some() {
        scissors.cut();
    }
    response
}

/// A request in flight, until its answer or until its client is gone.
struct InFlight(Arc<Shared>);

impl InFlight {
    fn enter(shared: &Arc<Shared>) -> Self {
        shared.state().books.enter();
        InFlight(Arc::clone(shared))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.state().books.leave();
    }
}

/// A failure in Tallyman's form.
pub fn failure(status: StatusCode, message: impl Into<String>) -> Response {
    (status, Json(serde_json::json!({ "message": message.into() }))).into_response()
}

async fn answer(
    shared: &Shared,
    request: u64,
    will_be_cut: bool,
    headers: &HeaderMap,
    body: Body,
) -> Response {
    let read = match deployment(shared, headers) {
        Ok(deployment_id) => read(body).await.map(|events| (deployment_id, events)),
        Err(refusal) => Err(refusal),
    };
    let mut state = shared.state();
    let (response, deliveries) = match read {
        Ok((deployment_id, events)) => {
            let now = shared.clock.now();
            let poison = state.running.poison(events.iter().map(|event| event.id.as_str()));
            let error = match poison {
                Some(status) => Some((status, false)),
                None => state.running.error(request),
            };
            let delivered = Delivered {
                request,
                deployment_id,
                now,
                answered: error.is_none() && !will_be_cut,
            };
            match error {
                Some((status, false)) => (fault(status), delivered.failed(&events)),
                Some((status, true)) => (fault(status), delivered.judge(&mut state, &events).1),
                None => {
                    let (answer, deliveries) = delivered.judge(&mut state, &events);
                    (Json(answer).into_response(), deliveries)
                }
            }
        }
        Err((status, message)) => (failure(status, message), Vec::new()),
    };
    match state.books.record(request, deliveries) {
        Ok(()) => response,
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
    }
}

fn fault(status: u16) -> Response {
    let message = if status < 500 { "the request is refused" } else { "internal server error" };
    failure(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), message)
}

/// The deployment of a request whose license and deployment are both known.
fn deployment(shared: &Shared, headers: &HeaderMap) -> Result<Uuid, (StatusCode, String)> {
    let refused = |what: &str| (StatusCode::UNAUTHORIZED, format!("{what} is missing or wrong"));
    let text = |name| {
        headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty())
    };
    let license = text("coder-license-key").ok_or_else(|| refused("Coder-License-Key"))?;
    if !shared.license_keys.is_empty() && !shared.license_keys.iter().any(|known| known == license)
    {
        return Err(refused("Coder-License-Key"));
    }
    let deployment = text("coder-deployment-id")
        .and_then(|id| Uuid::parse_str(id).ok().filter(|uuid| uuid.to_string() == id));
    let known = |id: &Uuid| shared.deployment_ids.is_empty() || shared.deployment_ids.contains(id);
    deployment.filter(known).ok_or_else(|| refused("Coder-Deployment-ID"))
}

async fn read(body: Body) -> Result<Vec<Received>, (StatusCode, String)> {
    let bad = |message| (StatusCode::BAD_REQUEST, message);
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES)
        .await
        .map_err(|error| bad(format!("read request body: {error}")))?;
    wire::parse(&body).map_err(bad)
}

/// The common data of all events of a request.
struct Delivered {
    request: u64,
    deployment_id: Uuid,
    now: DateTime<Utc>,
    /// Whether the answer reaches the client.
    answered: bool,
}

impl Delivered {
    fn failed(&self, events: &[Received]) -> Vec<Delivery> {
        events.iter().map(|event| self.delivery(event, Outcome::RequestFailed, false)).collect()
    }

    fn judge(&self, state: &mut ServerState, events: &[Received]) -> (Answer, Vec<Delivery>) {
        let mut answer = Answer::default();
        let mut deliveries = Vec::with_capacity(events.len());
        for event in events {
            let behaviour = state.running.event(&event.id, self.now);
            let outcome = match behaviour {
                _ if event.created_at < self.now - MAX_AGE => Outcome::TooOld,
                Some(Behaviour::RefuseForNow) => Outcome::RefusedForNow,
                Some(Behaviour::RefuseForEver) => Outcome::RefusedForEver,
                Some(Behaviour::Omit) => Outcome::Omitted,
                Some(Behaviour::OmitThoughTaken) | None => {
                    state.books.take(self.deployment_id, event, self.now)
                }
            };
            let omitted = matches!(behaviour, Some(Behaviour::Omit | Behaviour::OmitThoughTaken))
                && outcome != Outcome::TooOld;
            if !omitted {
                name(&mut answer, event, outcome);
            }
            deliveries.push(self.delivery(event, outcome, self.answered && !omitted));
        }
        (answer, deliveries)
    }

    fn delivery(&self, event: &Received, outcome: Outcome, answered: bool) -> Delivery {
        Delivery {
            request: self.request,
            at: self.now,
            deployment_id: self.deployment_id,
            id: event.id.clone(),
            json: event.json.clone(),
            outcome,
            answered,
        }
    }
}

fn name(answer: &mut Answer, event: &Received, outcome: Outcome) {
    let id = event.id.clone();
    let (message, permanent) = match outcome {
        Outcome::RefusedForNow => ("the event cannot be taken at the moment", false),
        Outcome::RefusedForEver => ("the event is refused", true),
        Outcome::TooOld => ("the event is older than 30 days", true),
        Outcome::Billed | Outcome::Remembered => {
            return answer.accepted_events.push(Accepted { id });
        }
        Outcome::Omitted | Outcome::RequestFailed => return,
    };
    answer.rejected_events.push(Rejected { id, message: message.to_owned(), permanent });
}
