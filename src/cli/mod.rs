//! The commands: answers on stdout, everything else on stderr.
//!
//! Each command has a file of its own. It gets its arguments and a [`Context`], and ends with an [`Exit`].

mod accept;
mod actor;
mod acts;
mod api;
pub mod audit;
mod check;
mod collect;
pub mod connect;
mod demo;
mod exit;
mod export;
mod given_file;
mod instant;
mod logging;
mod migrate;
mod output;
mod pause;
mod pipeline;
mod progress;
mod prove;
mod rebuild;
mod recover;
mod rejects;
mod replay;
pub mod roles;
pub mod run;
mod simulators;
mod slow_statements;
mod sources;
mod status;
mod stop;
mod via;

pub use exit::{Exit, Failure};
pub use logging::start as start_logging;
pub use output::{Output, columns, plain};
pub use pipeline::{PipelineArguments, license_rules};
pub use stop::on_signals;

use chrono::TimeDelta;
use clap::{Parser, Subcommand, ValueEnum};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::sim;

/// Meters Coder deployments: metrics and usage billing whose books balance.
#[derive(Clone, Debug, Parser)]
#[command(name = "tallyline", version, after_help = exit::TABLE, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What applies to every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// What applies to every command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The form of the log on stderr
    #[arg(long, global = true, value_enum, default_value = "human", value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// What is logged, as in RUST_LOG, which it wins over: a level, or target=level,…
    #[arg(long, global = true, value_name = "FILTER")]
    pub log_level: Option<String>,
    /// The form of the answer on stdout
    #[arg(long, global = true, value_enum, default_value = "table", value_name = "FORMAT")]
    pub output: Output,
    /// Seconds added to the machine's clock, for fault tests
    #[arg(long, global = true, default_value_t = 0, allow_negative_numbers = true, value_name = "SECONDS",
          value_parser = clap::value_parser!(i64).range(-3_200_000_000..=3_200_000_000))]
    pub clock_offset: i64,
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For reading.
    Human,
    /// One JSON object a line.
    Json,
}

/// The commands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the roles that a pipeline file names, until stopped
    Run(run::Arguments),
    /// List every mistake of a pipeline file
    Check(check::Arguments),
    /// Ask the running collector for something
    #[command(subcommand)]
    Collect(collect::Collect),
    /// Bring the ledger's schema and the log's topics to this version
    Migrate(migrate::Arguments),
    /// Show everything working on a private PostgreSQL and simulated traffic
    Demo(demo::Arguments),
    /// Write files for finance
    #[command(subcommand)]
    Export(export::Export),
    /// Fold the ledger again from zero and show what differs, also under other license rules or with another license
    #[command(subcommand)]
    Rebuild(rebuild::Rebuild),
    /// Bring everything back after a loss: of the log, of the ledger, or of coderd's database
    #[command(subcommand)]
    Recover(recover::Recover),
    /// Read a range of the log again: what is missing is added, what is there changes nothing
    #[command(subcommand)]
    Replay(replay::Replay),
    /// Work on records that are no accepted event: rejected, in conflict, or held
    #[command(subcommand)]
    Rejects(rejects::Rejects),
    /// Show where everything stands
    Status(status::Arguments),
    /// Stop collecting, consuming, publishing or exporting in all processes until it is resumed
    Pause(pause::Arguments),
    /// Go on with what was paused
    Resume(pause::ResumeArguments),
    /// Show the audit trail: who did what, when and why
    Acts(acts::Arguments),
    /// Work on the registered sources
    #[command(subcommand)]
    Sources(sources::Sources),
    /// Prove that the books balance, or list what differs
    Audit(audit::Arguments),
    /// Show the whole life of one event
    Prove(prove::Arguments),
    /// Simulate coderd in an empty PostgreSQL database
    CoderdSim(sim::coderd::Options),
    /// Simulate Tallyman
    TallymanSim(sim::tallyman::Options),
}

/// What a command gets from `main`.
#[derive(Clone, Debug)]
pub struct Context {
    /// The time.
    pub clock: Clock,
    /// Cancelled by SIGTERM and SIGINT.
    pub stop: CancellationToken,
    /// The form of the answer.
    pub output: Output,
}

impl Cli {
    /// The clock that the flags ask for.
    #[must_use]
    pub fn clock(&self) -> Clock {
        Clock::System { offset: TimeDelta::seconds(self.global.clock_offset) }
    }
}

/// Runs the command to its end.
pub async fn run(command: Command, context: Context) -> Result<Exit, Failure> {
    match command {
        // these hear the stop token themselves and end in good order
        Command::Run(arguments) => run::run(arguments, context).await,
        Command::Demo(arguments) => demo::run(arguments, context).await,
        Command::CoderdSim(options) => simulators::coderd(options, context).await,
        Command::TallymanSim(options) => simulators::tallyman(options, context).await,
        Command::Collect(collect) => collect::run(collect, context).await,
        Command::Recover(recover) => recover::run(recover, context).await,
        Command::Replay(replay) => replay::run(replay, context).await,
        Command::Status(arguments) => status::run(arguments, &context).await,
        // these leave nothing half done wherever they are dropped
        Command::Sources(arguments) => until_stopped(&context.stop, sources::run(arguments, &context)).await,
        Command::Acts(arguments) => until_stopped(&context.stop, acts::run(arguments, &context)).await,
        Command::Check(arguments) => until_stopped(&context.stop, check::run(arguments, &context)).await,
        Command::Migrate(arguments) => until_stopped(&context.stop, migrate::run(arguments, &context)).await,
        Command::Export(export) => until_stopped(&context.stop, export::run(export, &context)).await,
        Command::Rejects(rejects) => until_stopped(&context.stop, rejects::run(rejects, &context)).await,
        Command::Pause(arguments) => until_stopped(&context.stop, pause::pause(arguments, &context)).await,
        Command::Rebuild(rebuild) => until_stopped(&context.stop, rebuild::run(rebuild, &context)).await,
        Command::Resume(arguments) => until_stopped(&context.stop, pause::resume(arguments, &context)).await,
        Command::Audit(arguments) => until_stopped(&context.stop, audit::run(arguments, &context)).await,
        Command::Prove(arguments) => until_stopped(&context.stop, prove::run(arguments, &context)).await,
    }
}

async fn until_stopped(stop: &CancellationToken, command: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    stop.run_until_cancelled(command).await.unwrap_or_else(|| Err(Failure::interrupted()))
}
