//! Answers of commands.

use std::io::{self, Write as _};

use chrono::{DateTime, SecondsFormat, Utc};
use clap::ValueEnum;
use serde::Serialize;

use super::{Exit, Failure};

/// Format of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text for people.
    Table,
    /// One JSON document.
    Json,
}

impl Output {
    /// Writes the answer to stdout. A closed reader (`| head`) is not a failure.
    pub fn answer(
        self,
        answer: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let text = self.text(answer, table)?;
        let mut stdout = io::stdout().lock();
        gone_is_fine(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
    }

    /// Writes one of several answers to stdout, as one line if JSON. Returns false if the reader
    /// has closed.
    pub fn one_of_many(
        self,
        answer: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<bool, Failure> {
        let text = match self {
            Output::Table => table(),
            Output::Json => {
                serde_json::to_string(answer)
                    .map_err(|error| Failure::new(Exit::Internal, error))?
                    + "\n"
            }
        };
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            written => gone_is_fine(written).map(|()| true),
        }
    }

    /// Writes the answer to stderr, for commands that write a file to stdout.
    pub fn answer_aside(
        self,
        answer: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        gone_is_fine(io::stderr().lock().write_all(self.text(answer, table)?.as_bytes()))
    }

    fn text(
        self,
        answer: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<String, Failure> {
        Ok(match self {
            Output::Table => plain(&table()),
            Output::Json => {
                serde_json::to_string_pretty(answer)
                    .map_err(|error| Failure::new(Exit::Internal, error))?
                    + "\n"
            }
        })
    }
}

fn gone_is_fine(written: io::Result<()>) -> Result<(), Failure> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Refused, error).while_doing("the answer cannot be written"))
        }
        _ => Ok(()),
    }
}

/// Text that is safe for a terminal: control characters other than line feeds and tabs become
/// U+FFFD.
#[must_use]
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|character| {
            if is_obeyed(character) && !matches!(character, '\n' | '\t') {
                '\u{fffd}'
            } else {
                character
            }
        })
        .collect()
}

/// Whether a character affects the text around it: control characters, and format characters that
/// end a line or set its direction (Unicode's `Bidi_Control`).
fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Maximum characters of a cell, so that foreign text cannot make a table unreadable. JSON contains
/// the whole text.
const MAX_CELL_CHARS: usize = 4_200;

/// A cell as one line, safe for a terminal.
fn in_one_line(cell: &str) -> String {
    let mut text: String = cell
        .chars()
        .take(MAX_CELL_CHARS)
        .map(|character| if is_obeyed(character) { '\u{fffd}' } else { character })
        .collect();
    if cell.chars().nth(MAX_CELL_CHARS).is_some() {
        text.push('…');
    }
    text
}

/// A table: each column as wide as its widest cell, numbers on the right. Cells are safe for a
/// terminal; very long cells end in an ellipsis. Without rows, the table is empty.
#[must_use]
pub fn columns<const N: usize>(
    headings: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let rows: Vec<[String; N]> =
        rows.into_iter().map(|row| row.map(|cell| in_one_line(&cell))).collect();
    if rows.is_empty() {
        return String::new();
    }
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([headings[column].len()])
            .max()
            .unwrap_or(0)
    };
    let is_number = |column: usize| {
        rows.iter().all(|row| row[column].parse::<i128>().is_ok() || row[column] == "-")
    };
    let layout: Vec<(usize, bool)> =
        (0..N).map(|column| (width(column), is_number(column))).collect();
    let mut text = String::new();
    for row in std::iter::once(headings.map(str::to_owned)).chain(rows) {
        let cells = row.iter().zip(&layout).map(|(cell, (width, right))| {
            if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Joins the tables that have rows, with blank lines between them.
pub(super) fn joined(tables: impl IntoIterator<Item = String>) -> String {
    tables.into_iter().filter(|table| !table.is_empty()).collect::<Vec<_>>().join("\n")
}

/// The table, or `none` if it is empty.
pub(super) fn or_none(table: String) -> String {
    if table.is_empty() { "none\n".to_owned() } else { table }
}

pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// The time in UTC, in milliseconds.
pub(super) fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// The time in UTC, with all its digits.
pub(super) fn exact_time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

#[cfg(test)]
mod tests {
    use super::{MAX_CELL_CHARS, Output, columns, plain};

    #[test]
    fn columns_are_aligned_and_hold_no_control_characters() {
        let rows = [
            ["a".to_owned(), "7".to_owned(), "x\u{1b}[2J".to_owned()],
            ["long".to_owned(), "123".to_owned(), String::new()],
        ];
        assert_eq!(
            columns(["name", "count", "note"], rows),
            "name  count  note\na         7  x\u{fffd}[2J\nlong    123\n"
        );
        assert_eq!(columns(["a"], []), "");
    }

    #[test]
    fn a_cell_of_any_length_is_shown() {
        // longer than the maximum width in a format string
        let table = columns(
            ["a", "b"],
            [["é".repeat(70_000), "1".to_owned()], ["x".to_owned(), "2".to_owned()]],
        );
        let cut = "é".repeat(MAX_CELL_CHARS) + "…";
        let blanks = " ".repeat(MAX_CELL_CHARS);
        assert_eq!(table, format!("a{blanks}  b\n{cut}  1\nx{blanks}  2\n"));
    }

    #[test]
    fn what_a_terminal_would_obey_is_not_written() {
        assert_eq!(plain("a\u{1b}[2J\tb\r\n\u{9b}é"), "a\u{fffd}[2J\tb\u{fffd}\n\u{fffd}é");
        let turning = "\u{61c}\u{200e}\u{200f}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}\u{2028}\u{2029}";
        assert_eq!(plain(turning), "\u{fffd}".repeat(14));
        assert_eq!(
            columns(["a"], [[format!("gnp.{turning}exe")]]),
            format!("a\ngnp.{}exe\n", "\u{fffd}".repeat(14))
        );
        // right-to-left letters and joined characters are shown unchanged
        let seen = "שלום \u{200d}👩\u{200d}🔬 —…";
        assert_eq!(
            (plain(seen), columns(["a"], [[seen.to_owned()]])),
            (seen.to_owned(), format!("a\n{seen}\n"))
        );
        let json = Output::Json.text(&"a\u{202e}b", String::new).unwrap();
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), "a\u{202e}b");
    }
}
