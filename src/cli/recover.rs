//! `tallyline recover plan` and `tallyline recover execute`

use serde::Serialize;

use super::output::{or_dash, time};
use super::via::{Change, Query};
use super::{Context, Exit, Failure, columns};
use crate::ledger::Recovering;
use crate::operations::recover::{
    CoderdEffect, LedgerEffect, LogEffect, RecoverEffect, RecoverExecution, RecoverPlan,
    RecoverRequest,
};

/// Recover from a loss.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Recover {
    Plan(Query<RecoverRequest>),
    Execute(Change<RecoverExecution>),
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: RecoverPlan,
    /// `None` if there is nothing to execute.
    execute: Option<String>,
}

pub(super) async fn run(recover: Recover, context: &Context) -> Result<Exit, Failure> {
    match recover {
        Recover::Plan(query) => {
            let plan = query.run(context).await?;
            let execute = plan.hash.as_ref().map(|hash| {
                format!("tallyline recover execute {} --plan {hash}", query.via.again())
            });
            let answer = Planned { plan, execute };
            context.output.answer(&answer, || table(&answer.plan.effect) + &end(&answer))?;
        }
        Recover::Execute(change) => {
            let done = change.run(context).await?;
            context.output.answer(&done, || table(&done.effect) + "done\n")?;
        }
    }
    Ok(Exit::Success)
}

/// How to execute the plan, or why there is nothing to execute.
fn end(answer: &Planned) -> String {
    match (&answer.plan.hash, &answer.execute) {
        (Some(hash), Some(execute)) => format!("hash     {hash}\nexecute  {execute}\n"),
        _ => answer.plan.effect.nothing().map(|nothing| nothing + "\n").unwrap_or_default(),
    }
}

fn table(effect: &RecoverEffect) -> String {
    match effect {
        RecoverEffect::Log(effect) => log(effect),
        RecoverEffect::Ledger(effect) => ledger(effect),
        RecoverEffect::Coderd(effect) => coderd(effect),
    }
}

fn log(effect: &LogEffect) -> String {
    let rows = effect.partitions.iter().map(|one| {
        let [position, unread, reopened] =
            [one.position, one.unread, one.reopened].map(|number| number.to_string());
        let [start, end] = [one.log_start, one.log_end].map(or_dash);
        [
            one.topic.clone(),
            one.partition.to_string(),
            position,
            start,
            end,
            one.problem.replace('_', " "),
            unread,
            reopened,
        ]
    });
    let mut text = columns(
        ["TOPIC", "PARTITION", "POSITION", "LOG START", "LOG END", "PROBLEM", "UNREAD", "REOPENED"],
        rows,
    );
    for topic in &effect.topics_to_create {
        text += &format!("to be created: {topic}, {} partitions\n", effect.partitions_to_create);
    }
    if effect.partitions.is_empty() {
        return text;
    }
    text + "These partitions restart at the log's start. coderd is reread as a whole: unread records of collectors are appended again.\n\
            REOPENED: rejects whose resubmitted records are lost; they are open again, to be resubmitted or admitted.\n\
            UNREAD records of other producers are lost; records that they appended after the last pass of a collector are not known.\n"
}

fn ledger(effect: &LedgerEffect) -> String {
    let number = |number: i64| number.to_string();
    let published =
        effect.pending_published_by_coderd.map_or_else(|| "not known".to_owned(), number);
    let mut rows = vec![
        ["ledger ends at sequence".to_owned(), effect.sequence.to_string()],
        ["its newest batch is of".to_owned(), or_dash(effect.newest_batch_at.map(time))],
        ["its last act is of".to_owned(), or_dash(effect.last_act_at.map(time))],
        [
            "the log had been read up to a record of".to_owned(),
            effect.had_read_until.map_or_else(|| "not known".to_owned(), time),
        ],
        ["records of the log to read".to_owned(), number(effect.records_to_read)],
        ["sources to read again as a whole".to_owned(), effect.sources_to_read.len().to_string()],
        ["pending publications, each perhaps sent".to_owned(), number(effect.pending)],
        ["  published by coderd: not ours".to_owned(), published],
        [
            "  young enough: sent, perhaps again, billed once".to_owned(),
            number(effect.pending_to_send),
        ],
        ["  too old to be sent: unknown".to_owned(), number(effect.pending_too_old)],
    ];
    if effect.log_restored_too {
        rows.push(["pushed by others after the backup: lost".to_owned(), "not known".to_owned()]);
        rows.push([
            "names of what comes again from coderd".to_owned(),
            "as they are there today".to_owned(),
        ]);
    }
    if let Some(open) = &effect.open {
        rows.push(["open already".to_owned(), open.to_string()]);
    }
    let mut text = columns(["LEDGER", &effect.sequence.incarnation.to_string()], rows);
    if !effect.not_waited_for.is_empty() {
        let rows = effect.not_waited_for.iter().map(|source| {
            let why = if source.by_this_plan {
                "abandoned by this plan"
            } else {
                "not read for 35 days, or abandoned earlier"
            };
            [
                source.deployment_id.to_string(),
                or_dash(source.last_read_at.map(time)),
                number(source.events),
                number(source.pending),
                why.to_owned(),
            ]
        });
        text += &columns(["NOT WAITED FOR", "LAST READ", "EVENTS", "PENDING", "WHY"], rows);
        text += "Their events after the backup may be lost: series and counts of these sources may stay lower than they were, and the\n\
                 vendor may have amounts that this ledger does not know. If one is read again, its remaining events are added.\n";
    }
    if effect.log_restored_too {
        text += "A series whose template, organization or preset was renamed since the backup may be lower than it was, and another one higher.\n";
    }
    let to_do = "look at `tallyline audit-log`, and repeat those still needed: pauses before you start processes";
    text + &format!("{}; {to_do}.\n", Recovering::LOST_ACTS)
        + "Until it has caught up as another incarnation, no domain series are shown and nothing is published.\n"
}

fn coderd(effect: &CoderdEffect) -> String {
    let rows = effect.lost.iter().map(|lost| {
        let [events, published, pending] =
            [lost.events, lost.published, lost.pending].map(|number| number.to_string());
        [
            lost.event_type.clone(),
            events,
            lost.units.clone().unwrap_or_else(|| "-".to_owned()),
            published,
            pending,
        ]
    });
    let mut text = columns(["LOST IN CODERD", "EVENTS", "UNITS", "PUBLISHED", "PENDING"], rows);
    let numbers = [
        ("builds and claims that coderd has removed: they stay counted", effect.gone_builds),
        ("never confirmed, so nothing is done: `tallyline audit` lists them", effect.unconfirmed),
        ("usage ids with other content now", effect.ids_used_again),
        ("  still to be published: sent as they were accepted", effect.ids_used_again_pending),
        ("conflicts recorded so far", effect.conflicts),
        ("published here, no mark in coderd", effect.published_here_without_mark),
        (
            "published by coderd, mark gone: coderd sends them again",
            effect.published_by_coderd_without_mark,
        ),
    ];
    text += &columns(
        ["DEPLOYMENT", &effect.deployment_id.to_string()],
        numbers.map(|(what, number)| [what.to_owned(), number.to_string()]),
    );
    if effect.to_list == 0 {
        return text;
    }
    text + "Lost events stay counted, and what is pending of them may be sent although coderd has no row, or another one under the id. \
            coderd is read again as a whole.\n"
}
