//! Tallyline's command line.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use tallyline::cli::{self, Cli, Context, Exit, Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // Help and version are answers; a failure to print them does not matter.
            let _ = answer.print();
            return if answer.use_stderr() { Exit::Configuration } else { Exit::Success }.into();
        }
    };
    // A panic has already printed its message on stderr.
    match catch_unwind(AssertUnwindSafe(|| run(cli))) {
        Ok(Ok(exit)) => exit.into(),
        Ok(Err(failure)) => {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "tallyline: {}", cli::plain(&failure.text()));
            failure.exit.into()
        }
        Err(_) => Exit::Internal.into(),
    }
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    cli::start_logging(&cli)?;
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Failure::new(Exit::Internal, error))?;
    let ended = runtime.block_on(async {
        let stop = cli::on_signals().map_err(|error| Failure::new(Exit::Internal, error))?;
        let context = Context { clock: cli.clock(), stop, output: cli.global.output };
        cli::run(cli.command, context).await
    });
    // A hanging blocking call must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}
