//! Checks every request before its handler: host name, token and deadline.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Serving;
use super::answer::Problem;
use super::host::{self, Hosts};
use super::tokens::{Needs, admit};

/// Default deadline of an answer; a path may set another.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// The checks before one path.
#[derive(Clone)]
pub(super) struct Guard {
    serving: Arc<Serving>,
    needs: Needs,
    hosts: Hosts,
    deadline: Duration,
}

impl Guard {
    pub(super) fn new(
        serving: &Arc<Serving>,
        needs: Needs,
        hosts: Hosts,
        deadline: Duration,
    ) -> Self {
        Self { serving: Arc::clone(serving), needs, hosts, deadline }
    }
}

/// Lets an allowed request through, passes the caller to the handler, and enforces the deadline.
pub(super) async fn guard(
    State(guard): State<Guard>,
    mut request: Request,
    next: Next,
) -> Response {
    let settings = &guard.serving.settings;
    let tokens = settings.tokens.now();
    // a page of another origin has no token
    if tokens.is_empty()
        && let Err(problem) = host::admit(request.headers(), &settings.host_names, guard.hosts)
    {
        return problem.into_response();
    }
    match admit(&tokens, request.headers(), guard.needs) {
        Ok(caller) => request.extensions_mut().insert(caller),
        Err(problem) => return problem.into_response(),
    };
    match tokio::time::timeout(guard.deadline, next.run(request)).await {
        Ok(answer) => answer,
        Err(_) => {
            Problem::unavailable(format!("no answer within {} seconds", guard.deadline.as_secs()))
                .into_response()
        }
    }
}
