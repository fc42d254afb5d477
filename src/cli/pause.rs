//! `tallyline pause` and `tallyline resume`

use uuid::Uuid;

use super::via::Change;
use super::{Context, Exit, Failure};
use crate::ledger::{LateAudit, Pausable, Pause};
use crate::operations::{CoderdCutOff, PauseRequest, ResumeRequest, UnauditedPublishing};

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
    /// With publish: publish although the audit of this deployment, or of the ledger, is late. It
    /// ends with the next audit; needs a reason
    #[arg(long, value_name = "DEPLOYMENT_ID|ledger", value_parser = audited,
          conflicts_with_all = ["topic", "coderd_cut_off"])]
    unaudited: Option<Audited>,
}

/// Whose late audits do not hold publishing.
#[derive(Clone, Copy, Debug)]
enum Audited {
    Ledger,
    Source(Uuid),
}

fn audited(text: &str) -> Result<Audited, String> {
    if text == "ledger" {
        return Ok(Audited::Ledger);
    }
    text.parse().map(Audited::Source).map_err(|_| "must be a deployment id or `ledger`".to_owned())
}

pub(super) async fn resume(
    Resume { change, coderd_cut_off, unaudited }: Resume,
    context: &Context,
) -> Result<Exit, Failure> {
    let of_publish =
        [("--coderd-cut-off", coderd_cut_off.is_some()), ("--unaudited", unaudited.is_some())];
    if change.request.operation != Pausable::Publish
        && let Some((flag, _)) = of_publish.iter().find(|(_, is_set)| *is_set)
    {
        let problem = format!("{flag}: expected with `resume publish` only");
        return Err(Failure::of(Exit::Configuration, problem));
    }
    if let Some(deployment_id) = coderd_cut_off {
        let stop = change.via.run(&CoderdCutOff { deployment_id }, &change.actor, context).await?;
        let goes_on = || {
            format!(
                "publish of {} is resumed; coderd's last publish mark is {}\n",
                stop.deployment_id,
                stop.later_mark.to_rfc3339()
            )
        };
        context.output.answer(&stop, goes_on)?;
    } else if let Some(of) = unaudited {
        let deployment_id = match of {
            Audited::Ledger => None,
            Audited::Source(deployment_id) => Some(deployment_id),
        };
        let request = UnauditedPublishing { deployment_id };
        let overridden = change.via.run(&request, &change.actor, context).await?;
        let line = |late: &LateAudit| format!("publish does not wait any more: {late}\n");
        context.output.answer(&overridden, || overridden.joints.iter().map(line).collect())?;
    } else {
        let pause = change.run(context).await?;
        context.output.answer(&pause, || resumed(&pause))?;
    }
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
