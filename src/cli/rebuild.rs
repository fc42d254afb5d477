//! `tallyline rebuild plan` and `tallyline rebuild execute`

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::actor::ActorArguments;
use super::output::exact_time;
use super::progress::Progress;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, columns, given_file, instant};
use crate::license::MAX_TOKEN_BYTES;
use crate::operations::{
    Granted, LicenseToken, RebuildExecution, RebuildPlan, RebuildRequest, RebuildStage, Rebuilt, Rehearsal, RehearsedDeployment,
    SeriesValue,
};

/// Fold the ledger again from zero, also under other license rules or licenses.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Rebuild {
    /// Show differences from the shown state; writes nothing (exit code 1 if the state differs under the current rules and licenses)
    Plan(Plan),
    /// Compute the plan again and execute it if its hash is equal
    Execute(Execute),
}

/// Show differences from the shown state.
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    #[command(flatten)]
    via: ViaArguments,
    #[command(flatten)]
    asked: Asked,
    /// Rehearse with the license in this file, which coderd does not have yet; only coderd's administrators can install it
    #[arg(long, value_name = "FILE")]
    license: Option<PathBuf>,
    /// Rehearse without the license with this id (coderd's own); may be repeated
    #[arg(long, value_name = "LICENSE_ID")]
    without: Vec<i32>,
}

/// Compute the plan again and execute it.
#[derive(Clone, Debug, clap::Args)]
pub struct Execute {
    #[command(flatten)]
    via: ViaArguments,
    #[command(flatten)]
    asked: Asked,
    /// Hash that `tallyline rebuild plan` printed for the same arguments
    #[arg(long = "plan", value_name = "HASH")]
    hash: String,
    /// Execute even if shown series would decrease, which a metrics server treats as a restart
    #[arg(long)]
    may_fall: bool,
    #[command(flatten)]
    actor: ActorArguments,
}

/// Common arguments of plan and execution.
#[derive(Clone, Debug, clap::Args)]
struct Asked {
    /// Stage to fold
    #[arg(value_enum)]
    stage: RebuildStage,
    /// Rehearse these license rules: 2025-07 or 2026-02
    #[arg(long, value_name = "NAME")]
    rules: Option<String>,
    /// Deployment of the licenses, if there are several
    #[arg(long, value_name = "DEPLOYMENT_ID")]
    source: Option<Uuid>,
    /// Instant for which entitlements and warnings are rehearsed [default: now]
    #[arg(long, value_name = "INSTANT", value_parser = instant::instant)]
    at: Option<DateTime<Utc>>,
}

impl Asked {
    fn request(&self, license: Option<LicenseToken>, without: &[i32]) -> RebuildRequest {
        let (stage, rules, without) = (self.stage, self.rules.clone(), without.to_vec());
        RebuildRequest { stage, rules, license, without, source: self.source, at: self.at }
    }

    /// The same arguments for the other command.
    fn again(&self) -> String {
        let mut words = self.stage.as_str().to_owned();
        let options =
            [("rules", self.rules.clone()), ("source", self.source.map(|source| source.to_string())), ("at", self.at.map(exact_time))];
        for (name, value) in options {
            words += &value.map(|value| format!(" --{name} {value}")).unwrap_or_default();
        }
        words
    }
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: RebuildPlan,
    execute: Option<String>,
}

pub(super) async fn run(rebuild: Rebuild, context: &Context) -> Result<Exit, Failure> {
    match rebuild {
        Rebuild::Plan(arguments) => plan(arguments, context).await,
        Rebuild::Execute(arguments) => {
            let request =
                RebuildExecution { rebuild: arguments.asked.request(None, &[]), hash: arguments.hash, may_fall: arguments.may_fall };
            let rebuilt: Rebuilt = match arguments.via.open(context).await? {
                Via::Site(site) => {
                    let (desk, progress) = (site.desk()?, Progress::of_steps("batches"));
                    let rebuilt = desk.execute_rebuild(&request, &arguments.actor.actor(), folding(&progress)).await;
                    progress.finish();
                    rebuilt?
                }
                Via::Api(api) => api.patient().post(&["rebuilds", "execute"], &request, arguments.actor.reason_alone()?).await?,
            };
            context.output.answer(&rebuilt, || format!("{}\n", rebuilt.done))?;
            Ok(Exit::Success)
        }
    }
}

async fn plan(arguments: Plan, context: &Context) -> Result<Exit, Failure> {
    let license = arguments.license.as_ref().map(|path| {
        // a line feed may follow the token
        let text = given_file::text(path, MAX_TOKEN_BYTES + 1);
        text.map(LicenseToken).map_err(|problem| Failure::of(Exit::Configuration, format!("--license: {problem}")))
    });
    let request = arguments.asked.request(license.transpose()?, &arguments.without);
    let plan = match arguments.via.open(context).await? {
        Via::Site(site) => {
            let (desk, progress) = (site.desk()?, Progress::of_steps("batches"));
            let plan = desk.plan_rebuild(&request, folding(&progress)).await;
            progress.finish();
            plan?
        }
        Via::Api(api) => api.patient().post(&["rebuilds"], &request, "").await?,
    };
    let command = |hash: &String| format!("tallyline rebuild execute {} {} --plan {hash}", arguments.asked.again(), arguments.via.again());
    let answer = Planned { execute: plan.hash.as_ref().map(command), plan };
    context.output.answer(&answer, || table(&answer))?;
    Ok(if answer.plan.differs && answer.plan.rehearsal.is_none() { Exit::Differs } else { Exit::Success })
}

fn folding(progress: &Progress) -> impl Fn(u64, u64) + Send + Sync {
    |done, total| progress.at("folding", done, total)
}

fn table(answer: &Planned) -> String {
    let plan = &answer.plan;
    let mut text = match &plan.rehearsal {
        Some(rehearsal) => rehearsed(rehearsal),
        None => compared(plan),
    };
    match (&plan.hash, &answer.execute) {
        (Some(hash), Some(execute)) => text += &format!("hash     {hash}\nexecute  {execute}\n"),
        _ => text += "nothing to execute: licenses are installed and removed in coderd, by its administrators\n",
    }
    text
}

fn compared(plan: &RebuildPlan) -> String {
    let numbers = |told: Option<SeriesValue>| match told {
        Some(SeriesValue { count, sum_seconds: Some(sum) }) => format!("{count} in {sum} s"),
        Some(SeriesValue { count, sum_seconds: None }) => count.to_string(),
        None => "-".to_owned(),
    };
    let rows = plan.differences.iter().map(|row| [row.what.clone(), row.labels.clone(), numbers(row.shown), numbers(row.rebuilt)]);
    let table = columns(["WHAT", "WHICH", "SHOWN", "FROM ZERO"], rows);
    let verdict = match (plan.differs, plan.falling) {
        (false, _) => "what is shown is what the ledger says".to_owned(),
        (true, 0) => "what is shown is NOT what the ledger says".to_owned(),
        (true, falling) => format!("what is shown is NOT what the ledger says; {falling} shown series would fall"),
    };
    format!("{table}{verdict}, up to ledger sequence {}\n", plan.sequence)
}

fn rehearsed(rehearsal: &Rehearsal) -> String {
    let then = if rehearsal.rules_then == rehearsal.rules_now { String::new() } else { format!(" and {}", rehearsal.rules_then) };
    let mut text = format!("rules {}{then}, at {}\n", rehearsal.rules_now, exact_time(rehearsal.at));
    for note in &rehearsal.notes {
        text += &format!("{note}\n");
    }
    for deployment in &rehearsal.deployments {
        text += &format!("\ndeployment {}\n", deployment.deployment);
        text += &columns(HEADINGS, rows(deployment));
        for (when, granted) in [("now", &deployment.now), ("then", &deployment.then)] {
            text += &granted.warnings.iter().map(|warning| format!("{when}: warning: {warning}\n")).collect::<String>();
            text += &granted.errors.iter().map(|error| format!("{when}: error: {error}\n")).collect::<String>();
        }
    }
    text + "\n"
}

const HEADINGS: [&str; 10] = ["LICENSE", "VALIDITY", "", "ENTITLEMENT", "SOFT", "LIMIT", "AGENTS", "FROM", "UNTIL", "WARNINGS"];

/// Rows with the answer to coderd first, then with each license.
fn rows(deployment: &RehearsedDeployment) -> Vec<[String; 10]> {
    let mut rows = vec![row("all", "", "now", Some(&deployment.now)), row("", "", "then", Some(&deployment.then))];
    for window in &deployment.windows {
        let name = format!("{}{}", window.license_id, if window.candidate { " (candidate)" } else { "" });
        rows.push(row(&name, &window.validity, "now", window.now.as_ref()));
        rows.push(row("", "", "then", window.then.as_ref()));
    }
    rows
}

fn row(name: &str, validity: &str, when: &str, granted: Option<&Granted>) -> [String; 10] {
    let dash = || "-".to_owned();
    let mut cells = [name, validity, when, "not there", "-", "-", "-", "-", "-", "-"].map(str::to_owned);
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
