//! Exit codes and failures of commands.

use std::fmt;

use sqlx::migrate::MigrateError;

use crate::cause::{self, Remedy};
use crate::ledger::LedgerError;
use crate::log::LogError;
use crate::operations::OperationError;

/// Exit codes. They are part of the interface: a code never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Success = 0,
    /// The books, or the compared states, differ.
    Differs = 1,
    /// The command line or the configuration is wrong.
    Configuration = 2,
    /// PostgreSQL, Kafka or another dependency cannot be reached, or is not prepared.
    Unreachable = 3,
    /// Refused: for example a changed plan, a newer schema, a file that is not writable, or an
    /// incomplete range.
    Refused = 4,
    /// A fault of Tallyline.
    Internal = 70,
    /// Stopped by a signal before the work was done.
    Interrupted = 130,
}

/// The exit codes in `--help`.
pub const TABLE: &str = "Exit codes:
    0  done
    1  the books, or what was compared, differ
    2  the command line or the configuration is wrong
    3  a dependency cannot be reached or is not prepared
    4  refused: the plan changed, the schema is newer, the file cannot be written, the range is not complete
   70  a fault of Tallyline's own
  130  stopped by a signal before the work was done";

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        std::process::ExitCode::from(exit as u8)
    }
}

/// Why a command failed, and its exit code.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// The error with its causes.
    pub error: anyhow::Error,
}

impl Failure {
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Failure {
        Failure { exit, error: error.into() }
    }

    /// A failure with this code and message.
    pub fn of(exit: Exit, message: impl fmt::Display) -> Failure {
        Failure { exit, error: anyhow::anyhow!("{message}") }
    }

    /// A signal stopped the command.
    #[must_use]
    pub fn interrupted() -> Failure {
        Failure::of(Exit::Interrupted, "stopped by a signal")
    }

    /// The text for stderr: the error with its causes, each once.
    #[must_use]
    pub fn text(&self) -> String {
        cause::text(self.error.as_ref())
    }

    /// Adds the activity that failed.
    #[must_use]
    pub fn while_doing(self, what: impl fmt::Display + Send + Sync + 'static) -> Failure {
        Failure { exit: self.exit, error: self.error.context(what) }
    }
}

/// An error that no rule below covers is a fault of Tallyline.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let exit = match error.downcast_ref::<sqlx::Error>() {
            Some(database) => database_exit(database),
            None => Exit::Internal,
        };
        Failure { exit, error }
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Failure::new(database_exit(&error), error)
    }
}

impl From<LedgerError> for Failure {
    fn from(error: LedgerError) -> Self {
        let exit = match &error {
            LedgerError::Url(_) | LedgerError::CoderdDatabase => Exit::Configuration,
            LedgerError::Unavailable(cause) => database_exit(cause),
            LedgerError::SchemaTooOld { .. } | LedgerError::MissingRights(_) => Exit::Unreachable,
            LedgerError::SchemaTooNew { .. } => Exit::Refused,
            LedgerError::Migrate(
                MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _),
            ) => database_exit(cause),
            LedgerError::Migrate(_) => Exit::Internal,
        };
        Failure::new(exit, error)
    }
}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        let exit = log_exit(&error);
        match error {
            LogError::NoTopic(_) => Failure::of(exit, format!("{error}: run `tallyline migrate`")),
            error => Failure::new(exit, error),
        }
    }
}

impl From<OperationError> for Failure {
    fn from(error: OperationError) -> Self {
        let exit = match &error {
            OperationError::NotFound(_) | OperationError::Forbidden(_) => Exit::Refused,
            OperationError::Invalid { .. } => Exit::Configuration,
            OperationError::Ledger(cause) => database_exit(cause),
            OperationError::Log(cause) => log_exit(cause),
            OperationError::Coderd(_) => Exit::Unreachable,
            OperationError::Interrupted => Exit::Interrupted,
            OperationError::Internal(_) => Exit::Internal,
        };
        Failure::new(exit, error)
    }
}

/// A faulty connection or server state is not our fault. An error in the answer to our statement
/// is.
fn database_exit(error: &sqlx::Error) -> Exit {
    match error {
        sqlx::Error::Configuration(_) => Exit::Configuration,
        error if Remedy::of(error).is_retry() => Exit::Unreachable,
        _ => Exit::Internal,
    }
}

fn log_exit(error: &LogError) -> Exit {
    match error {
        LogError::Settings(_) => Exit::Configuration,
        LogError::Unreachable(_) | LogError::NoTopic(_) | LogError::Refused(_) => Exit::Unreachable,
        LogError::OutOfRange { .. }
        | LogError::Missing { .. }
        | LogError::Unreadable { .. }
        | LogError::TooLarge { .. } => Exit::Refused,
        LogError::Stopped => Exit::Interrupted,
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, PgConnection};
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_connection_cut_off_while_the_schema_is_read_is_unreachable() {
        let cut = || sqlx::Error::Io(std::io::ErrorKind::UnexpectedEof.into());
        for error in [MigrateError::Execute(cut()), MigrateError::ExecuteMigration(cut(), 1)] {
            assert_eq!(Failure::from(LedgerError::from(error)).exit, Exit::Unreachable);
        }
        assert_eq!(
            Failure::from(LedgerError::from(MigrateError::VersionMismatch(1))).exit,
            Exit::Internal
        );
    }

    #[tokio::test]
    async fn a_connection_cut_off_at_its_start_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("postgres://unknown@{}/none", listener.local_addr().expect("an address"));
        let cut = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            stream.read_exact(&mut [0; 8]).await.expect("the question for TLS");
        };
        let (connected, ()) = tokio::join!(PgConnection::connect(&url), cut);
        let error = connected.expect_err("cut off");
        assert_eq!(database_exit(&error), Exit::Unreachable, "{error}");
        assert_eq!(database_exit(&sqlx::Error::Protocol("unknown topic".into())), Exit::Internal);
    }

    #[test]
    fn the_table_that_help_shows_holds_every_code() {
        let all = [
            Exit::Success,
            Exit::Differs,
            Exit::Configuration,
            Exit::Unreachable,
            Exit::Refused,
            Exit::Internal,
            Exit::Interrupted,
        ];
        let shown: Vec<u8> = TABLE
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .collect();
        assert_eq!(shown, all.map(|exit| exit as u8));
    }
}
