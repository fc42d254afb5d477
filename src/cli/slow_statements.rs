//! Warns about slow statements, by operation. sqlx's own warning contains the whole SQL, which must
//! not be logged.

use std::fmt::Debug;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber, debug, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Target of sqlx's events about statements.
const TARGET: &str = "sqlx::query";

/// Replaces sqlx's warning by one that names the operation.
pub(super) struct SlowStatements;

impl<S: Subscriber> Layer<S> for SlowStatements {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if event.metadata().target() != TARGET {
            return true;
        }
        let mut statement = Statement::default();
        event.record(&mut statement);
        let (operation, elapsed_seconds) = (operation(statement.sql()), statement.elapsed_seconds);
        if statement.is_slow {
            warn!(operation, elapsed_seconds, "slow statement");
        } else {
            debug!(operation, elapsed_seconds, "statement");
        }
        false
    }
}

#[derive(Default)]
struct Statement {
    /// The first words, or the whole statement if it is short.
    summary: String,
    /// The whole statement, or empty.
    whole: String,
    elapsed_seconds: f64,
    is_slow: bool,
}

impl Statement {
    fn sql(&self) -> &str {
        if self.whole.is_empty() { &self.summary } else { &self.whole }
    }
}

impl Visit for Statement {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == "elapsed_secs" {
            self.elapsed_seconds = value;
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "summary" => self.summary = value.to_owned(),
            "db.statement" => self.whole = value.to_owned(),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, _: &dyn Debug) {
        self.is_slow |= field.name() == "slow_threshold";
    }
}

/// Verb and table of a statement, such as `insert batch`; of its writing part, if there is one.
/// Source: `db.query.summary` of OpenTelemetry's semantic conventions.
fn operation(sql: &str) -> String {
    let words: Vec<String> = sql
        .split(|character: char| {
            !(character.is_alphanumeric() || character == '_' || character == '.')
        })
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    let table_after = |word: &str, from: usize| {
        let at = words.iter().skip(from).position(|other| other == word)? + from;
        words.get(at + 1).cloned()
    };
    // `for update` locks rows but writes none
    let is_verb = |at: usize| {
        ["insert", "update", "delete"].contains(&words[at].as_str())
            && (at == 0 || words[at - 1] != "for")
    };
    let written = (0..words.len()).find(|at| is_verb(*at));
    let (verb, table) = match (written, words.first()) {
        (Some(at), _) => {
            let before_table = match words[at].as_str() {
                "insert" => "into",
                "delete" => "from",
                verb => verb,
            };
            (words[at].clone(), table_after(before_table, at))
        }
        (None, Some(first)) if first == "with" || first == "select" => {
            ("select".to_owned(), table_after("from", 0))
        }
        (None, Some(first)) => (first.clone(), None),
        (None, None) => return String::new(),
    };
    table.map_or(verb.clone(), |table| format!("{verb} {table}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_operation_is_a_verb_and_a_table() {
        for (sql, name) in [
            ("select id from source order by id", "select source"),
            ("insert into batch (kind) values ($1) returning id", "insert batch"),
            ("update ledger set next_sequence = next_sequence + 1", "update ledger"),
            ("delete from process where id = $1", "delete process"),
            (
                "with taken as (insert into batch (kind) values ('source') returning id) insert into license select 1",
                "insert batch",
            ),
            (
                "with pass as (select * from collector_pass) select 1 from pass",
                "select collector_pass",
            ),
            ("select from ledger for update", "select ledger"),
            ("COMMIT", "commit"),
            ("select now()", "select"),
            ("", ""),
        ] {
            assert_eq!(operation(sql), name, "{sql}");
        }
    }

    proptest! {
        /// A name has at most two words, so it contains neither values nor the text of a statement.
        #[test]
        fn an_operation_is_short(sql in "\\PC{0,80}|(select|insert|into|from|update|delete|with|for|[a-z' (),$1]{1,6}| ){0,20}") {
            prop_assert!(operation(&sql).split(' ').count() <= 2);
        }
    }
}
