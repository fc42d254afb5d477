//! The commands. They write answers to stdout, everything else to stderr.
//!
//! Each command has its own file. It gets its arguments and a [`Context`], and returns an [`Exit`].

mod accept;
mod actor;
mod api;
pub mod audit;
mod audit_log;
mod check;
mod collect;
pub mod connect;
mod context;
mod events;
mod exit;
mod explain;
mod export;
mod logging;
mod migrate;
mod output;
mod pause;
mod pipeline;
mod program;
mod progress;
mod prune;
mod rebuild;
mod recover;
mod rejects;
mod replay;
pub mod roles;
pub mod run;
mod slow_statements;
mod sources;
mod status;
mod stop;
mod via;

pub use context::Context;
pub use exit::{Exit, Failure, TABLE as EXIT_CODES};
pub use logging::LogDefaults;
pub use output::{Output, columns, plain};
pub use pipeline::{PipelineArguments, license_rules};
pub use program::start;

use chrono::TimeDelta;
use clap::{Parser, Subcommand, ValueEnum};
use context::until_stopped;
use std::pin::Pin;

use self::via::{Change, Query};
use crate::clock::Clock;
use crate::operations::{ExplainRequest, ListActs, PauseRequest, RunAudit};

/// Meters Coder deployments: metrics and usage billing whose books balance.
#[derive(Clone, Debug, Parser)]
#[command(name = "tallyline", version, after_help = exit::TABLE, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Format of the log on stderr
    #[arg(long, global = true, value_enum, default_value = "human", value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// Log filter: a level or target=level,…; overrides RUST_LOG
    #[arg(long, global = true, value_name = "FILTER")]
    pub log_level: Option<String>,
    /// Format of the answer on stdout
    #[arg(short, long, global = true, value_enum, default_value = "table", value_name = "FORMAT")]
    pub output: Output,
    /// Seconds added to the machine's clock, for fault tests
    #[arg(long, hide = true, global = true, default_value_t = 0, allow_negative_numbers = true,
          value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(-3_200_000_000..=3_200_000_000))]
    pub clock_offset: i64,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    Human,
    /// One JSON object per line.
    Json,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the roles of a pipeline file until stopped
    Run(run::Arguments),
    /// List every mistake of a pipeline file
    Check(check::Arguments),
    /// Send a request to the running collector
    #[command(subcommand)]
    Collect(collect::Collect),
    /// Bring the ledger's schema and the log's topics to this version
    Migrate(migrate::Arguments),
    /// Write exports for finance
    #[command(subcommand)]
    Export(export::Export),
    /// Fold the ledger again from zero and show differences, also under other license rules or
    /// licenses
    #[command(subcommand)]
    Rebuild(rebuild::Rebuild),
    /// Recover from a loss of the log, the ledger or coderd's database
    #[command(subcommand)]
    Recover(recover::Recover),
    /// Reread a range of the log: missing events are added, known events change nothing
    #[command(subcommand)]
    Replay(replay::Replay),
    /// Manage records that are not accepted events: rejected, in conflict, or held
    #[command(subcommand)]
    Rejects(rejects::Rejects),
    /// Show the state of all parts
    Status(status::Arguments),
    Pause(Change<PauseRequest>),
    Resume(pause::Resume),
    #[command(alias = "acts")]
    AuditLog(Query<ListActs>),
    /// Manage registered sources
    #[command(subcommand)]
    Sources(sources::Sources),
    /// Remove what the settings of retention do not keep
    #[command(subcommand)]
    Prune(prune::Prune),
    Audit(Query<RunAudit>),
    /// Correct accepted events that coderd does not have, or has with other content
    #[command(subcommand)]
    Events(events::Events),
    #[command(alias = "prove")]
    Explain(Query<ExplainRequest>),
}

impl Global {
    /// The clock with the offset of the flags.
    #[must_use]
    pub fn clock(&self) -> Clock {
        Clock::System { offset: TimeDelta::seconds(self.clock_offset) }
    }
}

impl Command {
    #[must_use]
    pub fn log_defaults(&self) -> LogDefaults {
        LogDefaults { level: "info", slow_statements: matches!(self, Command::Run(_)) }
    }
}

/// Runs a command to its end.
pub async fn run(command: Command, context: Context) -> Result<Exit, Failure> {
    // boxed: the compiler limits how deep futures nest
    Box::pin(dispatch(command, context)).await
}

/// Makes a future on the heap, so that the caller's stack has no room for each.
fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::pin(make())
}

async fn dispatch(command: Command, context: Context) -> Result<Exit, Failure> {
    match command {
        // these commands handle the stop token themselves
        Command::Run(arguments) => boxed(|| run::run(arguments, context)).await,
        Command::Collect(collect) => boxed(|| collect::run(collect, context)).await,
        Command::Replay(replay) => boxed(|| replay::run(replay, context)).await,
        Command::Status(arguments) => boxed(|| status::run(arguments, &context)).await,
        // these commands can be dropped at any point without partial changes
        Command::Sources(arguments) => {
            until_stopped(&context.stop, boxed(|| sources::run(arguments, &context))).await
        }
        Command::AuditLog(arguments) => {
            until_stopped(&context.stop, boxed(|| audit_log::run(arguments, &context))).await
        }
        Command::Check(arguments) => {
            until_stopped(&context.stop, boxed(|| check::run(arguments, &context))).await
        }
        Command::Migrate(arguments) => {
            until_stopped(&context.stop, boxed(|| migrate::run(arguments, &context))).await
        }
        Command::Export(export) => {
            until_stopped(&context.stop, boxed(|| export::run(export, &context))).await
        }
        Command::Rejects(rejects) => {
            until_stopped(&context.stop, boxed(|| rejects::run(rejects, &context))).await
        }
        Command::Pause(arguments) => {
            until_stopped(&context.stop, boxed(|| pause::pause(arguments, &context))).await
        }
        Command::Recover(recover) => {
            until_stopped(&context.stop, boxed(|| recover::run(recover, &context))).await
        }
        Command::Rebuild(rebuild) => {
            until_stopped(&context.stop, boxed(|| rebuild::run(rebuild, &context))).await
        }
        Command::Prune(prune) => {
            until_stopped(&context.stop, boxed(|| prune::run(prune, &context))).await
        }
        Command::Resume(arguments) => {
            until_stopped(&context.stop, boxed(|| pause::resume(arguments, &context))).await
        }
        Command::Audit(arguments) => {
            until_stopped(&context.stop, boxed(|| audit::run(arguments, &context))).await
        }
        Command::Events(arguments) => {
            until_stopped(&context.stop, boxed(|| events::run(arguments, &context))).await
        }
        Command::Explain(arguments) => {
            until_stopped(&context.stop, boxed(|| explain::run(arguments, &context))).await
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use serde_json::json;

    use super::*;
    use crate::api::{body_of, query_of};
    use crate::operations::recover::{Lost, RecoverEffect, RecoverRequest};
    use crate::operations::{CountRejects, ListRejects, RebuildExecution};

    fn help(command: &mut clap::Command) -> String {
        let mut text = command.render_long_help().to_string();
        for inner in command.get_subcommands_mut() {
            text += &help(inner);
        }
        text
    }

    #[test]
    fn words_of_earlier_versions_work_and_no_help_shows_them() {
        for line in [
            "acts",
            "prove workspace_build_completed:00000000-0000-0000-0000-000000000001",
            "recover plan --lost kafka",
            "rebuild execute metrics --plan ce23 --may-fall",
            "rejects list --verdict held",
            "rejects list --by verdict",
            "audit --patience 60",
            "status --watch 2",
        ] {
            let words = ["tallyline"].into_iter().chain(line.split(' '));
            let parsed = Cli::try_parse_from(words.chain(["--pipeline", "single.toml"]));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
        let mut command = Cli::command();
        command.build();
        let help = help(&mut command);
        for new in ["\n  audit-log", "\n  explain", "- log:", "--allow-decrease", "--disposition"] {
            assert!(help.contains(new), "{new:?} is missing: {help}");
        }
        for old in ["\n  acts", "\n  prove", "- kafka:", "--may-fall", "verdict", "--clock-offset"]
        {
            assert!(!help.contains(old), "{old:?} is shown: {help}");
        }
    }

    #[test]
    fn fields_of_earlier_versions_are_read() {
        let (list, _) = query_of::<ListRejects>("verdict=held").unwrap();
        assert_eq!(list.which.disposition.as_deref(), Some("held"));
        let (count, _) = query_of::<CountRejects>("by=verdict").unwrap();
        assert_eq!(count.by.as_str(), "disposition");
        let rebuild = br#"{"rebuild": {"stage": "metrics"}, "hash": "ce23", "may_fall": true}"#;
        assert!(body_of::<RebuildExecution>(rebuild).unwrap().0.allow_decrease);
        // plans are stored with their request and their effect
        let request: RecoverRequest = serde_json::from_value(json!({ "lost": "kafka" })).unwrap();
        assert_eq!(request.lost, Lost::Log);
        let effect = json!({
            "loss": "kafka",
            "topics_to_create": [],
            "partitions_to_create": 6,
            "partitions": [],
        });
        let effect: RecoverEffect = serde_json::from_value(effect).unwrap();
        assert_eq!(serde_json::to_value(&effect).unwrap()["loss"], "log");
    }
}
