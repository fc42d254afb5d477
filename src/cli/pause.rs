//! `tallyline pause` and `tallyline resume`

use super::actor::ActorArguments;
use super::roles::Site;
use super::{Context, Exit, Failure, PipelineArguments};
use crate::ledger::{Pausable, Pause};
use crate::operations::PauseRequest;

/// Stop or go on with something in all processes.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// What stands still or goes on
    #[arg(value_enum)]
    operation: Operation,
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Only this topic, by its full name; only for consume
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    #[command(flatten)]
    actor: ActorArguments,
}

/// What can be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Operation {
    /// Reading coderd's database
    Collect,
    /// Reading the log into the ledger
    Consume,
    /// Sending usage to the vendor
    Publish,
    /// Writing files for finance
    Export,
}

impl Arguments {
    fn request(&self) -> PauseRequest {
        let operation = match self.operation {
            Operation::Collect => Pausable::Collect,
            Operation::Consume => Pausable::Consume,
            Operation::Publish => Pausable::Publish,
            Operation::Export => Pausable::Export,
        };
        PauseRequest { operation, topic: self.topic.clone() }
    }
}

pub(super) async fn pause(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let site = open(&arguments, context).await?;
    let pause = site.desk()?.pause(&arguments.request(), &arguments.actor.actor()).await?;
    context.output.answer(&pause, || format!("{pause}\n"))?;
    Ok(Exit::Success)
}

pub(super) async fn resume(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let site = open(&arguments, context).await?;
    let pause = site.desk()?.resume(&arguments.request(), &arguments.actor.actor()).await?;
    context.output.answer(&pause, || resumed(&pause))?;
    Ok(Exit::Success)
}

async fn open(arguments: &Arguments, context: &Context) -> Result<Site, Failure> {
    let site = Site::open(arguments.pipeline.load()?, context.clock.clone()).await?;
    site.ledger.reach().await?;
    Ok(site)
}

fn resumed(pause: &Pause) -> String {
    let of = pause.topic.as_ref().map(|topic| format!(" of {topic}")).unwrap_or_default();
    format!("{}{of} goes on; it was paused by {}: {}\n", pause.operation.name(), pause.actor, pause.reason)
}
