//! The context of a command, and its stop.

use tokio_util::sync::CancellationToken;

use super::{Exit, Failure, Output};
use crate::clock::Clock;

/// Context of a command, from `main`.
#[derive(Clone, Debug)]
pub struct Context {
    pub clock: Clock,
    /// Cancelled by SIGTERM and SIGINT.
    pub stop: CancellationToken,
    /// Format of the answer.
    pub output: Output,
}

/// Drops the command at a stop.
pub(super) async fn until_stopped(
    stop: &CancellationToken,
    command: impl Future<Output = Result<Exit, Failure>>,
) -> Result<Exit, Failure> {
    stop.run_until_cancelled(command).await.unwrap_or_else(|| Err(Failure::interrupted()))
}
