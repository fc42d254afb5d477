//! `tallyline acts`

use chrono::{DateTime, Utc};

use super::output::time;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, columns, instant};
use crate::ledger::{ActKind, ListActs};
use crate::operations::Acts;

/// Show the audit trail: actor, act, time and reason, the latest first.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    via: ViaArguments,
    /// Only acts of this actor: a login name, a token's name, or "tallyline VERSION"
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Only acts of this kind: resubmit, admit, discard, pause, resume, replay, rebuild, recover, accept, retire or reinstate
    #[arg(long, value_name = "ACT")]
    act: Option<ActKind>,
    /// Only acts on this subject: a reject's id, a plan's hash, an operation or a deployment
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// Only acts at or after this instant (RFC 3339, or a date in UTC)
    #[arg(long, value_name = "TIME", value_parser = instant::instant)]
    from: Option<DateTime<Utc>>,
    /// Only acts before this instant
    #[arg(long, value_name = "TIME", value_parser = instant::instant)]
    to: Option<DateTime<Utc>>,
    /// Only acts with smaller ids: the next page
    #[arg(long, value_name = "ID")]
    before: Option<i64>,
    /// Maximum number of acts, 1 to 1000
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    limit: u16,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let Arguments { via, actor, act, subject, from, to, before, limit } = arguments;
    let request = ListActs { actor, act, subject, from, to, before, limit: Some(limit) };
    let answer = match via.open(context).await? {
        Via::Site(site) => site.desk()?.acts(&request).await?,
        Via::Api(api) => api.get(&["acts"], &request).await?,
    };
    context.output.answer(&answer, || table(&answer))?;
    Ok(Exit::Success)
}

fn table(answer: &Acts) -> String {
    let rows = answer.acts.iter().map(|act| {
        [act.id.to_string(), time(act.acted_at), act.actor.clone(), act.act.to_string(), act.subject.clone(), act.reason.clone()]
    });
    let page = columns(["ID", "AT", "WHO", "WHAT", "SUBJECT", "WHY"], rows);
    match answer.next_before {
        Some(before) => format!("{page}more with  --before {before}\n"),
        None if page.is_empty() => "no act\n".to_owned(),
        None => page,
    }
}
