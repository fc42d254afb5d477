//! `tallyline pause` and `tallyline resume`

use serde_json::json;
use uuid::Uuid;

use super::actor::ActorArguments;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure};
use crate::ledger::{Pausable, Pause, PublishStop};
use crate::operations::{CoderdCutOff, PauseRequest};

/// Pause an operation in all processes.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Operation to pause or resume
    #[arg(value_enum)]
    operation: Operation,
    #[command(flatten)]
    via: ViaArguments,
    /// Only this topic, by its full name; only for consume
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    #[command(flatten)]
    actor: ActorArguments,
}

/// Operations that can be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Operation {
    /// Reading coderd's database
    Collect,
    /// Reading the log into the ledger
    Consume,
    /// Sending usage to the vendor
    Publish,
    /// Writing exports for finance
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
    let request = arguments.request();
    let pause = match arguments.via.open(context).await? {
        Via::Site(site) => site.desk()?.pause(&request, &arguments.actor.actor()).await?,
        Via::Api(api) => api.post(&["pauses"], &request, arguments.actor.reason_alone()?).await?,
    };
    context.output.answer(&pause, || format!("{pause}\n"))?;
    Ok(Exit::Success)
}

/// Resume an operation in all processes.
#[derive(Clone, Debug, clap::Args)]
pub struct ResumeArguments {
    #[command(flatten)]
    what: Arguments,
    /// With publish: resume after coderd published by itself. Confirms that its own publishing is cut off; needs a reason
    #[arg(long, value_name = "DEPLOYMENT", conflicts_with = "topic")]
    coderd_cut_off: Option<Uuid>,
}

pub(super) async fn resume(arguments: ResumeArguments, context: &Context) -> Result<Exit, Failure> {
    let ResumeArguments { what: arguments, coderd_cut_off } = arguments;
    if let Some(deployment_id) = coderd_cut_off {
        return coderd_is_cut_off(&arguments, CoderdCutOff { deployment_id }, context).await;
    }
    let request = arguments.request();
    let pause = match arguments.via.open(context).await? {
        Via::Site(site) => site.desk()?.resume(&request, &arguments.actor.actor()).await?,
        Via::Api(api) => {
            let (path, topic) = (["pauses", request.operation.as_str()], json!({ "topic": request.topic }));
            api.delete(&path, &topic, arguments.actor.reason_alone()?).await?
        }
    };
    context.output.answer(&pause, || resumed(&pause))?;
    Ok(Exit::Success)
}

async fn coderd_is_cut_off(arguments: &Arguments, request: CoderdCutOff, context: &Context) -> Result<Exit, Failure> {
    if arguments.operation != Operation::Publish {
        return Err(Failure::of(Exit::Configuration, "--coderd-cut-off: expected with `resume publish` only"));
    }
    let stop: PublishStop = match arguments.via.open(context).await? {
        Via::Site(site) => site.desk()?.coderd_cut_off(&request, &arguments.actor.actor()).await?,
        Via::Api(api) => api.post(&["publish", "coderd-cut-off"], &request, arguments.actor.reason_alone()?).await?,
    };
    let goes_on = || format!("publish of {} goes on; coderd's last publish mark is {}\n", stop.deployment_id, stop.later_mark.to_rfc3339());
    context.output.answer(&stop, goes_on)?;
    Ok(Exit::Success)
}

fn resumed(pause: &Pause) -> String {
    let of = pause.topic.as_ref().map(|topic| format!(" of {topic}")).unwrap_or_default();
    format!("{}{of} goes on; it was paused by {}: {}\n", pause.operation.as_str(), pause.actor, pause.reason)
}
