//! `tallyline migrate`

use serde::Serialize;

use super::{Context, Exit, Failure, PipelineArguments, connect};
use crate::ledger::{LedgerError, rights};

/// Bring the ledger's schema and the log's topics to this version.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
}

#[derive(Serialize)]
struct Answer {
    ledger: String,
    log: String,
    /// Differences between existing topics and the settings. Existing topics are not changed.
    differences: Vec<String>,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let pipeline = arguments.pipeline.load()?;
    let ledger = connect::open_ledger(&pipeline, context.clock.clone()).await?;
    let log = connect::open_log(&pipeline, &ledger).await?;
    ledger.reach_server().await?;
    let creates = match ledger.ledger.check_schema().await {
        Err(error @ LedgerError::CoderdDatabase) => {
            return Err(Failure::from(error).while_doing(ledger.address));
        }
        outcome => matches!(outcome, Err(LedgerError::SchemaTooOld { .. })),
    };
    let lacking = ledger.ledger.run(async |conn| rights::missing(conn, creates).await).await?;
    if !lacking.is_empty() {
        let problem = format!(
            "{}: the role lacks rights; let an administrator run:\n{}",
            ledger.address,
            lacking.join("\n")
        );
        return Err(Failure::of(Exit::Unreachable, problem));
    }
    ledger.ledger.migrate().await.map_err(|error| {
        Failure::from(error).while_doing(format!("migrating {}", ledger.address))
    })?;
    let partitions = i32::try_from(pipeline.log.partitions)
        .map_err(|error| Failure::new(Exit::Internal, error))?;
    let differences = log.log.create_topics(partitions).await.map_err(|error| {
        Failure::from(error).while_doing(format!("creating the topics, {}", log.address))
    })?;
    let answer = Answer { ledger: ledger.address, log: log.address, differences };
    context.output.answer(&answer, || {
        let mut text = format!(
            "ledger  {}: schema is this binary's\nlog     {}: topics are there\n",
            answer.ledger, answer.log
        );
        for difference in &answer.differences {
            text.push_str(&format!("differs from the settings, not changed: {difference}\n"));
        }
        text
    })?;
    Ok(Exit::Success)
}
