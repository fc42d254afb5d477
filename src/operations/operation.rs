//! Requests and operations. The API and the command line are made from the same types.

use std::sync::atomic::{AtomicU64, Ordering};

use axum::http::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::{Actor, OperationError, Operations};

/// A request of the API that the command line can send. The documentation of its type is its
/// summary in the API and in the command's help; that of its fields describes them in both.
///
/// A `GET` needs a token of scope read. Another method needs one of scope admin.
pub trait ApiRequest: Serialize + DeserializeOwned + ToSchema + Send + Sync + 'static {
    type Answer: Serialize + DeserializeOwned + ToSchema + Send;
    const METHOD: Method = Method::GET;
    /// Segments in braces are fields of the request.
    const PATH: &'static str;
    /// Path of an earlier version. It answers too, and no document shows it.
    const OLD_PATH: Option<&'static str> = None;
    /// Description of the answer in the API's document.
    const ANSWER: &'static str;
    /// Whether the actor must give a reason.
    const NEEDS_REASON: bool = false;
    /// Whether it may read or write much, so that its answer has a longer deadline.
    const IS_LONG: bool = false;
}

/// An act or a question of an operator. [`Operations::run`] runs it.
pub trait Operation: ApiRequest {
    /// May be dropped at any point: a retry is then safe.
    fn run(
        &self,
        run: Run<'_>,
    ) -> impl Future<Output = Result<Self::Answer, OperationError>> + Send;
}

/// One run of an operation.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub operations: &'a Operations,
    pub actor: &'a Actor,
    pub progress: Progress<'a>,
    pub stop: &'a CancellationToken,
}

impl Operations {
    /// # Errors
    /// [`OperationError::Invalid`] if the operation needs a reason and the actor gives none.
    pub async fn run<R: Operation>(
        &self,
        request: &R,
        actor: &Actor,
        progress: Progress<'_>,
        stop: &CancellationToken,
    ) -> Result<R::Answer, OperationError> {
        if R::NEEDS_REASON {
            actor.require_reason()?;
        }
        request.run(Run { operations: self, actor, progress, stop }).await
    }
}

/// Progress: `done` of `total`. Kafka's offsets have gaps, so `done` may end below `total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The current activity, in one word.
    pub doing: &'static str,
    /// Name of the counted items.
    pub items: &'static str,
    /// Items finished in this call.
    pub done: u64,
    /// Items to finish in this call.
    pub total: u64,
}

/// Gets each step of an operation.
pub type Progress<'a> = &'a (dyn Fn(Step) + Send + Sync);

/// Adds finished items, and reports their sum.
pub(super) fn counting(
    (doing, items): (&'static str, &'static str),
    total: u64,
    progress: Progress<'_>,
) -> impl Fn(u64) + Send + Sync {
    let sum = AtomicU64::new(0);
    move |more| {
        progress(Step { doing, items, done: sum.fetch_add(more, Ordering::Relaxed) + more, total })
    }
}
