//! Reads the pipeline file.

use std::collections::BTreeSet;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistakes::{Mistakes, Place};
use super::settings::Settings;
use super::value::Raw;
use super::{KEYS, Key};

/// Reads the file. Returns false if parts of it could not be read: a setting that seems to be
/// missing may then only be unread.
pub(super) fn read(path: &Path, settings: &mut Settings, mistakes: &mut Mistakes) -> bool {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            mistakes.add_without_key(
                Place::File(path.to_owned(), None),
                format!("the pipeline file cannot be read: {error}"),
            );
            return false;
        }
    };
    let (table, errors) = DeTable::parse_recoverable(&text);
    let ends =
        text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect();
    let mut reader = Reader { path, ends, settings, mistakes, broken: BTreeSet::new() };
    for error in &errors {
        let line = reader.line(error.span().map_or(0, |span| span.start));
        reader.broken.insert(line);
        // only the message: the full text of the error repeats the line, which may contain a secret
        reader.mistakes.add_without_key(
            Place::File(path.to_owned(), Some(line)),
            format!("is not valid TOML: {}", error.message()),
        );
    }
    reader.table("", table.get_ref());
    errors.is_empty()
}

struct Reader<'a> {
    path: &'a Path,
    /// Offset of the end of each line.
    ends: Vec<usize>,
    settings: &'a mut Settings,
    mistakes: &'a mut Mistakes,
    /// Lines that are not valid TOML. Values guessed from them are meaningless.
    broken: BTreeSet<usize>,
}

impl Reader<'_> {
    /// Reads a table, or a part of the file that is not itself a key.
    fn table(&mut self, prefix: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let line = self.line(name.span().start);
            let full = if prefix.is_empty() {
                name.get_ref().to_string()
            } else {
                format!("{prefix}.{}", name.get_ref())
            };
            if !self.broken.contains(&line) {
                self.entry(&full, value, Place::File(self.path.to_owned(), Some(line)));
            }
        }
    }

    fn entry(&mut self, full: &str, value: &Spanned<DeValue<'_>>, place: Place) {
        let section = KEYS
            .iter()
            .any(|key| key.name.strip_prefix(full).is_some_and(|rest| rest.starts_with('.')));
        match (value.get_ref(), Key::of(full)) {
            (DeValue::Table(table), Some(key)) if key.kind.is_table() => self.table(full, table),
            (DeValue::Table(table), None) if section => self.table(full, table),
            (_, None) if section => self.mistakes.add(&place, full, "must be a table"),
            (_, None) => self.mistakes.add(&place, full, unknown(full)),
            (value, Some(key)) => match raw(value) {
                Some(raw) if !key.kind.is_table() || full != key.name => {
                    self.settings.add(key, full, raw, place)
                }
                _ => self.mistakes.add(&place, full, format!("must be {}", key.kind.allowed())),
            },
        }
    }

    /// The number of a line, from 1.
    fn line(&self, offset: usize) -> usize {
        self.ends.partition_point(|end| *end < offset) + 1
    }
}

/// The message for an unknown key, with the known keys.
pub(super) fn unknown(full: &str) -> String {
    let (section, _) = full.split_once('.').unwrap_or(("", full));
    let inside: Vec<&str> =
        KEYS.iter().filter_map(|key| key.name.strip_prefix(section)?.strip_prefix('.')).collect();
    if section.is_empty() || inside.is_empty() {
        let mut tops: Vec<&str> =
            KEYS.iter().map(|key| key.name.split('.').next().unwrap_or(key.name)).collect();
        tops.dedup();
        return format!("is unknown; expected one of {}", tops.join(", "));
    }
    format!("is unknown; [{section}] has {}", inside.join(", "))
}

fn raw(value: &DeValue<'_>) -> Option<Raw> {
    Some(match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Raw::Number(number.as_str().to_owned()),
        DeValue::Integer(number) => {
            Raw::Number(u64::from_str_radix(number.as_str(), number.radix()).ok()?.to_string())
        }
        DeValue::Float(number) => Raw::Number(number.as_str().to_owned()),
        DeValue::Boolean(boolean) => Raw::Boolean(*boolean),
        DeValue::Datetime(time) => Raw::Time(time.to_string()),
        DeValue::Array(items) => {
            Raw::List(items.iter().map(|item| raw(item.get_ref())).collect::<Option<_>>()?)
        }
        DeValue::Table(_) => return None,
    })
}

/// The entries of an inline table, `{ a = "b" }`. Flags and variables use this notation for a
/// table.
pub(super) fn inline_table(text: &str) -> Option<Vec<(String, Raw)>> {
    let mut entries = Vec::new();
    let value = DeValue::parse(text).ok()?;
    let DeValue::Table(table) = value.get_ref() else { return None };
    flatten("", table, &mut entries)?;
    Some(entries)
}

fn flatten(prefix: &str, table: &DeTable<'_>, entries: &mut Vec<(String, Raw)>) -> Option<()> {
    for (name, value) in table {
        let full = if prefix.is_empty() {
            name.get_ref().to_string()
        } else {
            format!("{prefix}.{}", name.get_ref())
        };
        match value.get_ref() {
            DeValue::Table(inner) => flatten(&full, inner, entries)?,
            value => entries.push((full, raw(value)?)),
        }
    }
    Some(())
}
