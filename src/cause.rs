//! Causes of errors: their text, the remedy for a caller, and whether a cause is news.

use std::error::Error;
use std::io;

use sqlx::error::DatabaseError;
use sqlx::postgres::PgConnectOptions;

/// The texts of the error and its causes, joined by `: `. A cause that the text already contains is
/// left out. The line of PostgreSQL's own source, which sqlx adds to a database's message, is
/// removed.
#[must_use]
pub fn text(error: &(dyn Error + 'static)) -> String {
    let causes: Vec<&(dyn Error + 'static)> =
        std::iter::successors(Some(error), |cause| (*cause).source()).collect();
    let answer = causes.iter().find_map(|cause| database(*cause));
    let mut text = String::new();
    for cause in causes {
        let mut words = cause.to_string();
        if let Some(answer) = answer {
            words = words
                .replace(&format!("error returned from database: {answer}"), answer.message())
                .replace(&answer.to_string(), answer.message());
        }
        if text.is_empty() {
            text = words;
        } else if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
    }
    text
}

/// The statement that grants the right to connect, if a login was refused because it lacks it.
#[must_use]
pub fn connect_grant(error: &sqlx::Error, options: &PgConnectOptions) -> Option<String> {
    (error.as_database_error()?.code()? == "42501").then(|| {
        let user = options.get_username();
        let database = options.get_database().unwrap_or(user);
        format!("grant connect on database {} to {};", identifier(database), identifier(user))
    })
}

/// The name in SQL syntax: quoted unless it is plain.
fn identifier(name: &str) -> String {
    let plain = |first: char| first.is_ascii_lowercase() || first == '_';
    let rest = |other: char| plain(other) || other.is_ascii_digit();
    match name.starts_with(plain) && name.chars().all(rest) {
        true => name.to_owned(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

/// The database's answer, if the cause is one.
fn database<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a (dyn DatabaseError + 'static)> {
    match cause.downcast_ref::<sqlx::Error>() {
        Some(error) => error.as_database_error(),
        None => cause.downcast_ref::<Box<dyn DatabaseError>>().map(|answer| &**answer),
    }
}

/// The remedy for an error of PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Retry: the fault is the connection, the server's state, its resources, another transaction,
    /// or a missing login, database or right.
    Retry,
    /// Retry with less data: the call took too long.
    RetryWithLess,
    /// Leave out the row: its data violates a rule or a limit.
    LeaveOut,
    None,
}

impl Remedy {
    /// Classifies by SQLSTATE, or by the reason of a lost connection.
    #[must_use]
    pub fn of(error: &sqlx::Error) -> Remedy {
        match error {
            sqlx::Error::Database(answer) => {
                Remedy::of_state(answer.code().as_deref().unwrap_or_default())
            }
            sqlx::Error::Io(cause) if cause.kind() == io::ErrorKind::TimedOut => {
                Remedy::RetryWithLess
            }
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) => Remedy::Retry,
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
                Remedy::Retry
            }
            // The connection was cut before the server answered whether it uses TLS.
            sqlx::Error::Protocol(problem) if problem.contains("SSLRequest") => Remedy::Retry,
            sqlx::Error::Encode(_) => Remedy::LeaveOut,
            _ => Remedy::None,
        }
    }

    #[must_use]
    pub fn is_retry(self) -> bool {
        !matches!(self, Remedy::LeaveOut | Remedy::None)
    }

    fn of_state(code: &str) -> Remedy {
        match code {
            // the server is a standby now; its time limit of an idle session
            "25006" | "57P05" => Remedy::Retry,
            // serialization failure, completion unknown, deadlock; object in use, lock not
            // available
            "40001" | "40003" | "40P01" | "55006" | "55P03" => Remedy::Retry,
            // shut down, crashed, starting; system error, input or output error
            "57P01" | "57P02" | "57P03" | "58000" | "58030" => Remedy::Retry,
            // time limits of a statement and of a transaction, in use or idle
            "57014" | "25P03" | "25P04" => Remedy::RetryWithLess,
            // prepared statements invalidated by a pooler or a schema change; a failed transaction;
            // an internal error
            "26000" | "42P05" | "0A000" | "25P02" | "XX000" => Remedy::Retry,
            // the database does not exist or was dropped, or a right is missing: an administrator
            // may be about to add it
            "3D000" | "57P04" | "42501" => Remedy::Retry,
            _ => match code.get(..2) {
                // connection exceptions, logins, insufficient resources
                Some("08" | "28" | "53") => Remedy::Retry,
                // data exceptions, constraints, limits such as the size of an index entry
                Some("22" | "23" | "54") => Remedy::LeaveOut,
                _ => Remedy::None,
            },
        }
    }
}

/// The cause of a condition that lasts. It is logged when it is new, not each time it occurs.
#[derive(Debug, Default)]
pub struct LastingFault(Option<String>);

impl LastingFault {
    /// Records the cause and returns whether it differs from the previous one.
    pub fn is_new(&mut self, cause: &str) -> bool {
        let is_new = self.0.as_deref() != Some(cause);
        if is_new {
            self.0 = Some(cause.to_owned());
        }
        is_new
    }

    /// Records that the condition has ended; false: it had not begun.
    pub fn end(&mut self) -> bool {
        self.0.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::fmt;

    use sqlx::error::ErrorKind;

    use super::*;

    /// Imitates PostgreSQL's error: the message, and the line in its source that reported it.
    #[derive(Debug)]
    struct Answer;

    impl fmt::Display for Answer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("permission denied for table batch at line 2741")
        }
    }

    impl Error for Answer {}

    impl DatabaseError for Answer {
        fn message(&self) -> &str {
            "permission denied for table batch"
        }
        fn code(&self) -> Option<Cow<'_, str>> {
            Some("42501".into())
        }
        fn as_error(&self) -> &(dyn Error + Send + Sync + 'static) {
            self
        }
        fn as_error_mut(&mut self) -> &mut (dyn Error + Send + Sync + 'static) {
            self
        }
        fn into_error(self: Box<Self>) -> Box<dyn Error + Send + Sync + 'static> {
            self
        }
        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error("the ledger cannot be used: {0}")]
        Repeated(#[from] sqlx::Error),
        #[error(transparent)]
        Passed(sqlx::Error),
    }

    fn answer() -> sqlx::Error {
        sqlx::Error::Database(Box::new(Answer))
    }

    #[test]
    fn a_database_error_appears_once_without_source_lines() {
        assert_eq!(text(&answer()), "permission denied for table batch");
        assert_eq!(
            text(&Outer::Repeated(answer())),
            "the ledger cannot be used: permission denied for table batch"
        );
        assert_eq!(text(&Outer::Passed(answer())), "permission denied for table batch");
        let context = anyhow::Error::from(Outer::Repeated(answer())).context("migrating");
        assert_eq!(
            text(context.as_ref()),
            "migrating: the ledger cannot be used: permission denied for table batch"
        );
    }

    #[test]
    fn each_error_has_its_remedy() {
        for (code, remedy) in [
            ("08006", Remedy::Retry),
            ("53300", Remedy::Retry),
            ("40001", Remedy::Retry),
            ("25006", Remedy::Retry),
            ("57P01", Remedy::Retry),
            ("57014", Remedy::RetryWithLess),
            ("25P03", Remedy::RetryWithLess),
            ("28P01", Remedy::Retry),
            ("42501", Remedy::Retry),
            ("26000", Remedy::Retry),
            ("XX000", Remedy::Retry),
            ("22021", Remedy::LeaveOut),
            ("23505", Remedy::LeaveOut),
            ("54000", Remedy::LeaveOut),
            ("42703", Remedy::None),
            ("40002", Remedy::None),
            ("XX001", Remedy::None),
            ("", Remedy::None),
        ] {
            assert_eq!(Remedy::of_state(code), remedy, "{code}");
        }
        assert_eq!(Remedy::of(&answer()), Remedy::Retry);
        assert_eq!(
            Remedy::of(&sqlx::Error::Io(io::ErrorKind::UnexpectedEof.into())),
            Remedy::Retry
        );
        assert_eq!(
            Remedy::of(&sqlx::Error::Io(io::ErrorKind::TimedOut.into())),
            Remedy::RetryWithLess
        );
        assert_eq!(Remedy::of(&sqlx::Error::Protocol("unknown topic".into())), Remedy::None);
    }

    #[test]
    fn a_cause_is_new_unless_it_is_the_last_one() {
        let mut lasting = LastingFault::default();
        assert!(!lasting.end());
        assert_eq!(
            ["a", "a", "b", "a"].map(|cause| lasting.is_new(cause)),
            [true, false, true, true]
        );
        assert!(lasting.end() && !lasting.end());
        assert!(lasting.is_new("a"));
    }

    #[test]
    fn other_causes_are_kept() {
        let cause = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused");
        let error = anyhow::Error::from(Outer::Repeated(cause.into())).context("reading at line 7");
        assert_eq!(
            text(error.as_ref()),
            "reading at line 7: the ledger cannot be used: error communicating with database: refused"
        );
        let error = anyhow::anyhow!("a file").context("an export");
        assert_eq!(text(error.as_ref()), "an export: a file");
    }
}
