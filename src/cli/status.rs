//! `tallyline status`

mod table;

use std::io::IsTerminal as _;
use std::time::Duration;

use tracing::warn;

use super::roles::Handles;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, Output, plain, until_stopped};
use crate::api::ShowStatus;
use crate::operations::duration_flag;
use crate::status::{self, Status};

/// Timeout to query the ends of the log.
const LOG_ANSWER: Duration = Duration::from_secs(60);
/// The same for `--watch`, where the next query follows soon.
const LOG_ANSWER_WATCHED: Duration = Duration::from_secs(10);
/// Moves the cursor to the upper left corner and clears the rest.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Show the state of all parts.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    via: ViaArguments,
    /// Refresh at this interval, 1s to 1h, until Ctrl-C [default: 2s]
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "2s",
          value_parser = interval)]
    watch: Option<Duration>,
    /// Also show processes last seen over an hour ago
    #[arg(long)]
    all: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let allowed = Duration::from_secs(1)..=Duration::from_secs(3600);
    let interval = duration_flag(text)?;
    if allowed.contains(&interval) { Ok(interval) } else { Err("must be 1s to 1h".to_owned()) }
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let via = arguments.via.prepare(context).await?;
    match arguments.watch {
        None => until_stopped(&context.stop, once(&via, arguments.all, context.output)).await,
        Some(interval) => {
            let watched = watch(&via, arguments.all, context.output, interval);
            // a signal is the normal end of a watch
            context.stop.run_until_cancelled(watched).await.unwrap_or(Ok(Exit::Success))
        }
    }
}

async fn once(via: &Via, all: bool, output: Output) -> Result<Exit, Failure> {
    let status = read(via, all, LOG_ANSWER).await?;
    output.answer(&status, || table::of(&status))?;
    match status.log_problem {
        None => Ok(Exit::Success),
        Some(problem) => {
            Err(Failure::of(Exit::Unreachable, format!("the lag is not known: {problem}")))
        }
    }
}

/// Continues while the ledger or the log is unreachable, because operators watch for that. Ends
/// when the reader closes.
async fn watch(via: &Via, all: bool, output: Output, every: Duration) -> Result<Exit, Failure> {
    let on_terminal = std::io::stdout().is_terminal();
    loop {
        match read(via, all, LOG_ANSWER_WATCHED).await {
            Ok(status) => {
                let block = || {
                    let table = plain(&table::of(&status));
                    if on_terminal { format!("{CLEAR}{table}") } else { format!("{table}\n") }
                };
                if !output.one_of_many(&status, block)? {
                    return Ok(Exit::Success);
                }
            }
            Err(failure) if failure.exit == Exit::Unreachable => warn!("{}", failure.text()),
            Err(failure) => return Err(failure),
        }
        tokio::time::sleep(every).await;
    }
}

async fn read(via: &Via, all: bool, log_answer: Duration) -> Result<Status, Failure> {
    let mut status = match via {
        Via::Handles(handles) => of_handles(handles, log_answer).await?,
        Via::Api(api) => api.ask(&ShowStatus {}, "").await?,
    };
    status.processes.retain(|process| all || !process.long_gone);
    Ok(status)
}

async fn of_handles(handles: &Handles, log_answer: Duration) -> Result<Status, Failure> {
    handles.ledger.reach().await?;
    let ledger = &handles.ledger.ledger;
    let mut status = status::read(ledger, &handles.log.log, log_answer).await?;
    status.log_problem =
        status.log_problem.map(|problem| format!("{}: {problem}", handles.log.address));
    Ok(status)
}
