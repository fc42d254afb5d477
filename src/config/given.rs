//! Given settings: their origin and their value.

use std::collections::BTreeMap;

use serde_json::Value;

use super::mistakes::{Mistakes, Place};
use super::value::{self, Raw, is_name};
use super::{Key, Kind};

#[derive(Clone, Debug)]
pub(super) struct Given {
    pub key: &'static Key,
    /// Name of the key. For an entry of a table, the entry's name is appended.
    pub name: String,
    pub raw: Raw,
    pub place: Place,
}

/// All given settings, the weakest first: file, variables, flags.
#[derive(Debug, Default)]
pub(super) struct Settings(Vec<Given>);

/// Value and place of each key, with defaults. Entries of tables have their full names. Secrets are stored as given, not resolved.
#[derive(Default)]
pub(super) struct Values {
    pub found: BTreeMap<String, (Value, Place)>,
    /// Keys with wrong values. They are not missing.
    wrong: Vec<String>,
}

impl Settings {
    pub fn give(&mut self, key: &'static Key, name: &str, raw: Raw, place: Place) {
        self.0.push(Given { key, name: name.to_owned(), raw, place });
    }

    /// Parses every value. An overridden value is also checked.
    pub fn values(self, public_key_fault: Option<fn(&str, &str) -> Option<String>>, mistakes: &mut Mistakes) -> Values {
        let mut values = Values::default();
        for key in super::KEYS {
            if let Some(default) = key.default
                && let Ok(value) = value::read(key.kind, &Raw::Untyped(default.to_owned()))
            {
                values.found.insert(key.name.to_owned(), (value, Place::Default));
            }
        }
        for given in self.0 {
            match read(&given, public_key_fault) {
                Ok(value) => {
                    values.found.insert(given.name, (value, given.place));
                }
                Err(problem) => {
                    mistakes.add(&given.place, &given.name, problem);
                    // draw no conclusions from a value that a wrong one overrides
                    values.found.remove(&given.name);
                    values.wrong.push(given.name);
                }
            }
        }
        values
    }
}

fn read(given: &Given, public_key_fault: Option<fn(&str, &str) -> Option<String>>) -> Result<Value, String> {
    let value = value::read(given.key.kind, &given.raw)?;
    let name = given.name.get(given.key.name.len() + 1..).unwrap_or_default();
    if matches!(given.key.kind, Kind::Tokens) && !is_name(name, 1, 100) {
        return Err("must be named by 1 to 100 letters, digits, '.', '_' or '-': it is who acts, in the audit trail".into());
    }
    if matches!(given.key.kind, Kind::SignatureKeys) && !is_name(name, 1, 100) {
        return Err("must be named by 1 to 100 letters, digits, '.', '_' or '-': records name it in their signatures".into());
    }
    if let (Kind::PublicKeys, Some(key)) = (given.key.kind, value.as_str())
        && let Some(fault) = public_key_fault.and_then(|fault| fault(name, key))
    {
        return Err(format!("is {fault}"));
    }
    Ok(value)
}

impl Values {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.found.get(name).and_then(|(value, _)| value.as_str())
    }

    /// Where the value was given.
    pub fn place(&self, name: &str) -> Place {
        self.found.get(name).map_or(Place::Default, |(_, place)| place.clone())
    }

    /// Whether the key has neither a value nor a default.
    pub fn is_missing(&self, name: &str) -> bool {
        !self.found.contains_key(name) && !self.wrong.iter().any(|wrong| wrong == name)
    }

    /// Whether no entry of the table was given, right or wrong.
    pub fn is_empty_table(&self, name: &str) -> bool {
        let is_entry = |full: &String| full.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        !self.found.keys().chain(&self.wrong).any(is_entry)
    }

    /// The entries of a table by their own names. All values are texts.
    pub fn table<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, Option<&'a str>, &'a Place)> {
        let entry = move |full: &'a str| full.strip_prefix(name)?.strip_prefix('.');
        self.found.iter().filter_map(move |(full, (value, place))| Some((entry(full)?, value.as_str(), place)))
    }
}
