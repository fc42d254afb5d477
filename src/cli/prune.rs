//! `tallyline prune plan` and `tallyline prune execute`

use serde::Serialize;

use super::output::{exact_time, or_dash, time};
use super::via::{Change, Query};
use super::{Context, Exit, Failure, columns};
use crate::operations::{PruneExecution, PrunePlan, PruneRequest, Pruned};

/// Remove what the settings of retention do not keep.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Prune {
    Plan(Query<PruneRequest>),
    Execute(Change<PruneExecution>),
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: PrunePlan,
    /// `None` if there is nothing to execute.
    execute: Option<String>,
}

pub(super) async fn run(prune: Prune, context: &Context) -> Result<Exit, Failure> {
    match prune {
        Prune::Plan(query) => {
            let plan = query.run(context).await?;
            let execute = plan.hash.as_ref().map(|hash| {
                format!(
                    "tallyline prune execute {} --at {} --plan {hash} --reason TEXT",
                    query.via.again(),
                    exact_time(plan.at)
                )
            });
            let answer = Planned { plan, execute };
            context.output.answer(&answer, || planned(&answer))?;
        }
        Prune::Execute(change) => {
            let pruned = change.run(context).await?;
            context.output.answer(&pruned, || removed(&pruned))?;
        }
    }
    Ok(Exit::Success)
}

fn planned(answer: &Planned) -> String {
    let rows = answer.plan.kinds.iter().map(|one| {
        let days = if one.days == 0 { "for ever".to_owned() } else { one.days.to_string() };
        [
            one.kind.to_string(),
            days,
            one.rows.to_string(),
            one.bytes.to_string(),
            or_dash(one.oldest.map(time)),
            or_dash(one.newest.map(time)),
        ]
    });
    let table = columns(["KIND", "DAYS KEPT", "ROWS DUE", "BYTES", "OLDEST", "NEWEST"], rows);
    let evidence = evidence(answer.plan.kinds.iter().map(|one| one.kept));
    match (&answer.plan.hash, &answer.execute) {
        (Some(hash), Some(execute)) => {
            format!("{table}{evidence}hash     {hash}\nexecute  {execute}\n")
        }
        _ => format!("{table}{evidence}nothing is due\n"),
    }
}

/// A line about rows that are kept, if there are any.
fn evidence(kept: impl Iterator<Item = i64>) -> String {
    match kept.sum::<i64>() {
        0 => String::new(),
        rows => format!(
            "{rows} rows past their days are kept as evidence: they do not match the digest of their batch; `tallyline audit --deep` names the changed ones\n"
        ),
    }
}

fn removed(pruned: &Pruned) -> String {
    let rows = pruned.kinds.iter().map(|one| {
        [one.kind.to_string(), one.removed.rows.to_string(), one.removed.bytes.to_string()]
    });
    let act = pruned.act_id.map(|id| format!("counted in act {id}\n")).unwrap_or_default();
    let evidence = evidence(pruned.kinds.iter().map(|one| one.kept));
    columns(["KIND", "ROWS REMOVED", "BYTES"], rows) + &evidence + &act
}
