//! `tallyline sources`

use uuid::Uuid;

use super::actor::ActorArguments;
use super::output::{or_dash, or_none, time};
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, accept, columns};
use crate::operations::{OneSource, RegisteredSource, Sources as Listed};

/// Manage registered sources.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Sources {
    /// List the registered sources
    List(List),
    /// Retire a source: nothing waits for it any more, and its collector and publisher refuse to work
    Retire(Change),
    /// End the retirement of a source
    Reinstate(Change),
    /// Bind a source to the coderd that the pipeline names, even if it was bound to another one
    Accept(accept::Arguments),
}

/// List the registered sources.
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    #[command(flatten)]
    via: ViaArguments,
}

/// Change one source. Needs a reason.
#[derive(Clone, Debug, clap::Args)]
pub struct Change {
    #[command(flatten)]
    via: ViaArguments,
    #[command(flatten)]
    actor: ActorArguments,
    /// coderd's deployment id, as shown by `list`
    #[arg(value_name = "DEPLOYMENT")]
    deployment_id: Uuid,
}

pub(super) async fn run(sources: Sources, context: &Context) -> Result<Exit, Failure> {
    match sources {
        Sources::Accept(arguments) => return accept::run(arguments, context).await,
        Sources::List(arguments) => {
            let listed = match arguments.via.open(context).await? {
                Via::Site(site) => site.desk()?.list_sources().await?,
                Via::Api(api) => api.get(&["sources"], &()).await?,
            };
            context.output.answer(&listed, || table(&listed))?;
        }
        Sources::Retire(arguments) => {
            let request = OneSource { deployment_id: arguments.deployment_id };
            let source = match arguments.via.open(context).await? {
                Via::Site(site) => site.desk()?.retire_source(&request, &arguments.actor.actor()).await?,
                Via::Api(api) => api.post(&["sources", "retire"], &request, arguments.actor.reason_alone()?).await?,
            };
            context.output.answer(&source, || retired(&source))?;
        }
        Sources::Reinstate(arguments) => {
            let request = OneSource { deployment_id: arguments.deployment_id };
            let source = match arguments.via.open(context).await? {
                Via::Site(site) => site.desk()?.reinstate_source(&request, &arguments.actor.actor()).await?,
                Via::Api(api) => api.post(&["sources", "reinstate"], &request, arguments.actor.reason_alone()?).await?,
            };
            context.output.answer(&source, || format!("{} is in use\n", source.deployment_id))?;
        }
    }
    Ok(Exit::Success)
}

fn retired(source: &RegisteredSource) -> String {
    let pending = match source.pending {
        0 => String::new(),
        pending => format!("; pending usage events, neither sent nor expired until it is reinstated: {pending}"),
    };
    format!("{} is retired{pending}\n", source.deployment_id)
}

fn table(listed: &Listed) -> String {
    let row = |source: &RegisteredSource| {
        let (by, why) = source.retired.as_ref().map_or(("-", "-"), |retired| (retired.actor.as_str(), retired.reason.as_str()));
        let retired_at = or_dash(source.retired.as_ref().map(|retired| time(retired.acted_at)));
        [
            source.deployment_id.to_string(),
            time(source.introduced_at),
            or_dash(source.last_read_at.map(time)),
            or_dash(source.complete_until.map(time)),
            retired_at,
            by.to_owned(),
            why.to_owned(),
        ]
    };
    let headings = ["SOURCE", "INTRODUCED", "LAST READ", "COMPLETE UNTIL", "RETIRED", "BY", "REASON"];
    or_none(columns(headings, listed.sources.iter().map(row)))
}
