//! `tallyline sources`

use super::output::{or_dash, or_none, time};
use super::via::{Change, Query};
use super::{Context, Exit, Failure, accept, columns};
use crate::operations::{
    ListSources, RegisteredSource, ReinstateSource, RetireSource, Sources as Listed,
};

/// Manage registered sources.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Sources {
    List(Query<ListSources>),
    Retire(Change<RetireSource>),
    Reinstate(Change<ReinstateSource>),
    /// Bind a source to the coderd that the pipeline names, even if it was bound to another one
    Accept(accept::Arguments),
}

pub(super) async fn run(sources: Sources, context: &Context) -> Result<Exit, Failure> {
    match sources {
        Sources::List(query) => {
            let listed = query.run(context).await?;
            context.output.answer(&listed, || table(&listed))?;
        }
        Sources::Retire(change) => {
            let source = change.run(context).await?;
            context.output.answer(&source, || retired(&source))?;
        }
        Sources::Reinstate(change) => {
            let source = change.run(context).await?;
            context.output.answer(&source, || format!("{} is in use\n", source.deployment_id))?;
        }
        Sources::Accept(arguments) => return accept::run(arguments, context).await,
    }
    Ok(Exit::Success)
}

fn retired(source: &RegisteredSource) -> String {
    let pending = match source.pending {
        0 => String::new(),
        pending => format!(
            "; pending usage events, neither sent nor expired until it is reinstated: {pending}"
        ),
    };
    format!("{} is retired{pending}\n", source.deployment_id)
}

fn table(listed: &Listed) -> String {
    let row = |source: &RegisteredSource| {
        let (by, why) = source
            .retired
            .as_ref()
            .map_or(("-", "-"), |retired| (retired.actor.as_str(), retired.reason.as_str()));
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
    let headings =
        ["SOURCE", "INTRODUCED", "LAST READ", "COMPLETE UNTIL", "RETIRED", "BY", "REASON"];
    or_none(columns(headings, listed.sources.iter().map(row)))
}
