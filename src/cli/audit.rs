//! `tallyline audit`

use super::{Context, Exit, Failure, PipelineArguments};

/// Prove that the books balance, or list what differs.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
}

pub(super) async fn run(arguments: Arguments, _context: &Context) -> Result<Exit, Failure> {
    arguments.pipeline.load()?;
    Err(Failure::of(Exit::Internal, "the audit is not built yet"))
}
