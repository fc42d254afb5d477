//! Tallyline's command line.

use std::process::ExitCode;

use tallyline::cli::{self, Cli};

fn main() -> ExitCode {
    cli::start(
        |cli: &Cli| (&cli.global, cli.command.log_defaults()),
        |cli, context| cli::run(cli.command, context),
    )
}
