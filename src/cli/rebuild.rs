//! `tallyline rebuild plan` and `tallyline rebuild execute`

use serde::Serialize;

use super::output::exact_time;
use super::via::{Change, Query};
use super::{Context, Exit, Failure, columns};
use crate::operations::{
    Granted, RebuildExecution, RebuildPlan, RebuildRequest, Rehearsal, RehearsedDeployment,
    SeriesValue,
};

/// Fold the ledger again from zero, also under other license rules or licenses.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Rebuild {
    /// Show the differences from the shown state, or the effect of other rules or licenses; writes
    /// nothing
    ///
    /// The exit code is 1 if the state differs under the current rules and licenses.
    Plan(Query<RebuildRequest>),
    Execute(Change<RebuildExecution>),
}

/// The same arguments for the other command.
fn again(request: &RebuildRequest) -> String {
    let mut words = request.stage.as_str().to_owned();
    let options = [
        ("rules", request.rules.clone()),
        ("source", request.source.map(|source| source.to_string())),
        ("at", request.at.map(exact_time)),
    ];
    for (name, value) in options {
        words += &value.map(|value| format!(" --{name} {value}")).unwrap_or_default();
    }
    words
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: RebuildPlan,
    execute: Option<String>,
}

pub(super) async fn run(rebuild: Rebuild, context: &Context) -> Result<Exit, Failure> {
    match rebuild {
        Rebuild::Plan(query) => {
            let plan = query.run(context).await?;
            let command = |hash: &String| {
                format!(
                    "tallyline rebuild execute {} {} --plan {hash}",
                    again(&query.request),
                    query.via.again()
                )
            };
            let answer = Planned { execute: plan.hash.as_ref().map(command), plan };
            context.output.answer(&answer, || table(&answer))?;
            Ok(if answer.plan.differs && answer.plan.rehearsal.is_none() {
                Exit::Differs
            } else {
                Exit::Success
            })
        }
        Rebuild::Execute(change) => {
            let rebuilt = change.run(context).await?;
            context.output.answer(&rebuilt, || format!("{}\n", rebuilt.done))?;
            Ok(Exit::Success)
        }
    }
}

fn table(answer: &Planned) -> String {
    let plan = &answer.plan;
    let mut text = match &plan.rehearsal {
        Some(rehearsal) => rehearsed(rehearsal),
        None => compared(plan),
    };
    match (&plan.hash, &answer.execute) {
        (Some(hash), Some(execute)) => text += &format!("hash     {hash}\nexecute  {execute}\n"),
        _ => {
            text += "nothing to execute: licenses are installed and removed in coderd, by its administrators\n"
        }
    }
    text
}

fn compared(plan: &RebuildPlan) -> String {
    let numbers = |told: Option<SeriesValue>| match told {
        Some(SeriesValue { count, sum_seconds: Some(sum) }) => format!("{count} in {sum} s"),
        Some(SeriesValue { count, sum_seconds: None }) => count.to_string(),
        None => "-".to_owned(),
    };
    let rows = plan.differences.iter().map(|row| {
        [row.what.clone(), row.labels.clone(), numbers(row.shown), numbers(row.rebuilt)]
    });
    let table = columns(["WHAT", "WHICH", "SHOWN", "FROM ZERO"], rows);
    let result = match (plan.differs, plan.falling) {
        (false, _) => "the shown state equals the ledger".to_owned(),
        (true, 0) => "the shown state DIFFERS from the ledger".to_owned(),
        (true, falling) => {
            format!(
                "the shown state DIFFERS from the ledger; {falling} shown series would decrease"
            )
        }
    };
    format!("{table}{result}, up to ledger sequence {}\n", plan.sequence)
}

fn rehearsed(rehearsal: &Rehearsal) -> String {
    let then = if rehearsal.rules_then == rehearsal.rules_now {
        String::new()
    } else {
        format!(" and {}", rehearsal.rules_then)
    };
    let mut text =
        format!("rules {}{then}, at {}\n", rehearsal.rules_now, exact_time(rehearsal.at));
    for note in &rehearsal.notes {
        text += &format!("{note}\n");
    }
    for deployment in &rehearsal.deployments {
        text += &format!("\ndeployment {}\n", deployment.deployment);
        text += &columns(HEADINGS, rows(deployment));
        for (when, granted) in [("now", &deployment.now), ("then", &deployment.then)] {
            text += &granted
                .warnings
                .iter()
                .map(|warning| format!("{when}: warning: {warning}\n"))
                .collect::<String>();
            text += &granted
                .errors
                .iter()
                .map(|error| format!("{when}: error: {error}\n"))
                .collect::<String>();
        }
    }
    text + "\n"
}

const HEADINGS: [&str; 10] = [
    "LICENSE",
    "VALIDITY",
    "",
    "ENTITLEMENT",
    "SOFT",
    "LIMIT",
    "AGENTS",
    "FROM",
    "UNTIL",
    "WARNINGS",
];

/// Rows with the answer to coderd first, then with each license.
fn rows(deployment: &RehearsedDeployment) -> Vec<[String; 10]> {
    let mut rows = vec![
        row("all", "", "now", Some(&deployment.now)),
        row("", "", "then", Some(&deployment.then)),
    ];
    for window in &deployment.windows {
        let name =
            format!("{}{}", window.license_id, if window.candidate { " (candidate)" } else { "" });
        rows.push(row(&name, &window.validity, "now", window.now.as_ref()));
        rows.push(row("", "", "then", window.then.as_ref()));
    }
    rows
}

fn row(name: &str, validity: &str, when: &str, granted: Option<&Granted>) -> [String; 10] {
    let dash = || "-".to_owned();
    let mut cells =
        [name, validity, when, "not there", "-", "-", "-", "-", "-", "-"].map(str::to_owned);
    if let Some(granted) = granted {
        let number = |number: Option<i64>| number.map_or_else(dash, |number| number.to_string());
        let switched_off = granted.entitlement != "not_entitled" && !granted.enabled;
        cells[3] = format!("{}{}", granted.entitlement, if switched_off { ", off" } else { "" });
        cells[4] = number(granted.soft_limit);
        cells[5] = number(granted.limit);
        cells[6] = granted.agents.map_or_else(dash, |agents| agents.to_string());
        cells[7] = granted.start.map_or_else(dash, exact_time);
        cells[8] = granted.end.map_or_else(dash, exact_time);
        cells[9] = (granted.warnings.len() + granted.errors.len()).to_string();
    }
    cells
}
