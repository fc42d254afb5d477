//! `tallyline sources accept`

use uuid::Uuid;

use super::actor::ActorArguments;
use super::roles::Handles;
use super::{Context, Exit, Failure, PipelineArguments};

/// Bind a source to the coderd that this pipeline names, even if it was bound to another one. Needs
/// a reason.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    #[command(flatten)]
    actor: ActorArguments,
    /// coderd's deployment id, as shown by `list`
    #[arg(value_name = "DEPLOYMENT_ID")]
    source_id: Uuid,
    /// Confirm that the source continues on this coderd
    #[arg(long, required = true)]
    accept_new_identity: bool,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let handles = Handles::open(arguments.pipeline.load()?, context.clock.clone()).await?;
    handles.ledger.reach().await?;
    let accepted = handles
        .operations()?
        .accept_identity(arguments.source_id, &arguments.actor.actor())
        .await?;
    context.output.answer(&accepted, || {
        format!(
            "{} is bound to the coderd with deployment id {} and default organization {}\n",
            accepted.source_id, accepted.deployment_id, accepted.organization_id
        )
    })?;
    Ok(Exit::Success)
}
