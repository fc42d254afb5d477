//! The life of a process: command line, logging, signals, exit code.

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use super::logging::{self, LogDefaults};
use super::stop::on_signals;
use super::{Context, Exit, Failure, Global, plain};

/// Parses the command line, starts logging and runs the command to its end.
pub fn start<Line, Run>(
    logs: impl Fn(&Line) -> (&Global, LogDefaults),
    run: impl FnOnce(Line, Context) -> Run,
) -> ExitCode
where
    Line: Parser,
    Run: Future<Output = Result<Exit, Failure>>,
{
    let line = match Line::try_parse() {
        Ok(line) => line,
        Err(answer) => {
            // Help and version are answers; a failure to print them does not matter.
            let _ = answer.print();
            return if answer.use_stderr() { Exit::Configuration } else { Exit::Success }.into();
        }
    };
    let (global, defaults) = logs(&line);
    let global = global.clone();
    // A panic has already printed its message on stderr.
    match catch_unwind(AssertUnwindSafe(|| {
        to_its_end(&global, defaults, |context| run(line, context))
    })) {
        Ok(Ok(exit)) => exit.into(),
        Ok(Err(failure)) => {
            let _ = writeln!(
                std::io::stderr(),
                "{}: {}",
                Line::command().get_name(),
                plain(&failure.text())
            );
            failure.exit.into()
        }
        Err(_) => Exit::Internal.into(),
    }
}

fn to_its_end<Run>(
    global: &Global,
    defaults: LogDefaults,
    run: impl FnOnce(Context) -> Run,
) -> Result<Exit, Failure>
where
    Run: Future<Output = Result<Exit, Failure>>,
{
    logging::start(global, defaults)?;
    let runtime =
        tokio::runtime::Runtime::new().map_err(|error| Failure::new(Exit::Internal, error))?;
    let ended = runtime.block_on(async {
        let stop = on_signals().map_err(|error| Failure::new(Exit::Internal, error))?;
        run(Context { clock: global.clock(), stop, output: global.output }).await
    });
    // A hanging blocking call must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}
