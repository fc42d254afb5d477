//! `tallyline pause` and `tallyline resume`

use uuid::Uuid;

use super::via::Change;
use super::{Context, Exit, Failure};
use crate::ledger::{Pausable, Pause};
use crate::operations::{CoderdCutOff, PauseRequest, ResumeRequest};

pub(super) async fn pause(
    change: Change<PauseRequest>,
    context: &Context,
) -> Result<Exit, Failure> {
    let pause = change.run(context).await?;
    context.output.answer(&pause, || format!("{pause}\n"))?;
    Ok(Exit::Success)
}

/// Resume a paused operation in all processes
#[derive(Clone, Debug, clap::Args)]
pub struct Resume {
    #[command(flatten)]
    change: Change<ResumeRequest>,
    /// With publish: resume after coderd published by itself. Confirms that its own publishing is
    /// cut off; needs a reason
    #[arg(long, value_name = "DEPLOYMENT_ID", conflicts_with = "topic")]
    coderd_cut_off: Option<Uuid>,
}

pub(super) async fn resume(
    Resume { change, coderd_cut_off }: Resume,
    context: &Context,
) -> Result<Exit, Failure> {
    let Some(deployment_id) = coderd_cut_off else {
        let pause = change.run(context).await?;
        context.output.answer(&pause, || resumed(&pause))?;
        return Ok(Exit::Success);
    };
    if change.request.operation != Pausable::Publish {
        return Err(Failure::of(
            Exit::Configuration,
            "--coderd-cut-off: expected with `resume publish` only",
        ));
    }
    let stop = change.via.run(&CoderdCutOff { deployment_id }, &change.actor, context).await?;
    let goes_on = || {
        format!(
            "publish of {} is resumed; coderd's last publish mark is {}\n",
            stop.deployment_id,
            stop.later_mark.to_rfc3339()
        )
    };
    context.output.answer(&stop, goes_on)?;
    Ok(Exit::Success)
}

fn resumed(pause: &Pause) -> String {
    let of = pause.topic.as_ref().map(|topic| format!(" of {topic}")).unwrap_or_default();
    format!(
        "{}{of} is resumed; it was paused by {}: {}\n",
        pause.operation.as_str(),
        pause.actor,
        pause.reason
    )
}
