//! `tallyline sources`

use super::{Context, Exit, Failure, accept};

/// Work on the registered sources.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Sources {
    /// Bind a source to the coderd that the pipeline names, where it is another one than before
    Accept(accept::Arguments),
}

pub(super) async fn run(sources: Sources, context: &Context) -> Result<Exit, Failure> {
    match sources {
        Sources::Accept(arguments) => accept::run(arguments, context).await,
    }
}
