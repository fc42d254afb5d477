//! Causes of errors: their text, and when one is news.

use std::error::Error;

use sqlx::error::DatabaseError;
use sqlx::postgres::PgConnectOptions;

/// The error's text and those of its causes, joined by `: `. A cause that the text repeats is left out. So is what sqlx adds to the message of
/// a database: the line of PostgreSQL's own source that reported it.
#[must_use]
pub fn text(error: &(dyn Error + 'static)) -> String {
    let causes: Vec<&(dyn Error + 'static)> = std::iter::successors(Some(error), |cause| (*cause).source()).collect();
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

/// The statement that gives the right to connect, where a login was refused for the lack of it.
#[must_use]
pub fn connect_grant(error: &sqlx::Error, options: &PgConnectOptions) -> Option<String> {
    (error.as_database_error()?.code()? == "42501").then(|| {
        let user = options.get_username();
        let database = options.get_database().unwrap_or(user);
        format!("grant connect on database {} to {};", identifier(database), identifier(user))
    })
}

/// The name as SQL writes it: in quotes, unless it is plain.
fn identifier(name: &str) -> String {
    let plain = |first: char| first.is_ascii_lowercase() || first == '_';
    let rest = |other: char| plain(other) || other.is_ascii_digit();
    match name.starts_with(plain) && name.chars().all(rest) {
        true => name.to_owned(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

/// The answer of a database, where the cause is one.
fn database<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a (dyn DatabaseError + 'static)> {
    match cause.downcast_ref::<sqlx::Error>() {
        Some(error) => error.as_database_error(),
        None => cause.downcast_ref::<Box<dyn DatabaseError>>().map(|answer| &**answer),
    }
}

/// The cause of a condition that lasts. It is logged when it is news, not each time that it is met.
#[derive(Debug, Default)]
pub struct Lasting(Option<String>);

impl Lasting {
    /// Notes the cause; whether it is another than before.
    pub fn is_news(&mut self, cause: &str) -> bool {
        let is_news = self.0.as_deref() != Some(cause);
        if is_news {
            self.0 = Some(cause.to_owned());
        }
        is_news
    }

    /// Notes that there is no cause; whether there was one.
    pub fn has_ended(&mut self) -> bool {
        self.0.take().is_some()
    }

    /// Whether there is a cause.
    #[must_use]
    pub fn lasts(&self) -> bool {
        self.0.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::fmt;

    use sqlx::error::ErrorKind;

    use super::*;

    /// As PostgreSQL's: the message, and where in its source it was reported.
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
    fn a_database_is_quoted_once_and_without_its_source_lines() {
        assert_eq!(text(&answer()), "permission denied for table batch");
        assert_eq!(text(&Outer::Repeated(answer())), "the ledger cannot be used: permission denied for table batch");
        assert_eq!(text(&Outer::Passed(answer())), "permission denied for table batch");
        let context = anyhow::Error::from(Outer::Repeated(answer())).context("migrating");
        assert_eq!(text(context.as_ref()), "migrating: the ledger cannot be used: permission denied for table batch");
    }

    #[test]
    fn a_cause_is_news_until_it_is_met_again_and_after_it_has_ended() {
        let mut lasting = Lasting::default();
        assert!(!lasting.has_ended());
        assert_eq!(["a", "a", "b", "a"].map(|cause| lasting.is_news(cause)), [true, false, true, true]);
        assert!(lasting.lasts() && lasting.has_ended() && !lasting.lasts());
        assert!(lasting.is_news("a"));
    }

    #[test]
    fn other_causes_are_kept() {
        let cause = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused");
        let error = anyhow::Error::from(Outer::Repeated(cause.into())).context("reading at line 7");
        assert_eq!(text(error.as_ref()), "reading at line 7: the ledger cannot be used: error communicating with database: refused");
        let error = anyhow::anyhow!("a file").context("an export");
        assert_eq!(text(error.as_ref()), "an export: a file");
    }
}
