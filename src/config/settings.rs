//! Given settings: their origin and their value.

use std::collections::BTreeMap;

use serde_json::Value;

use super::mistakes::{Mistakes, Place};
use super::value::{self, Raw, is_name};
use super::{Key, Kind};

#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub key: &'static Key,
    /// Name of the key. For an entry of a table, the entry's name is appended.
    pub name: String,
    pub raw: Raw,
    pub place: Place,
}

/// All given settings, the weakest first: file, variables, flags.
#[derive(Debug, Default)]
pub(super) struct Settings(Vec<Setting>);

/// Value and place of each key, with defaults. Entries of tables have their full names. Secrets are
/// stored as given, not resolved.
#[derive(Default)]
pub(super) struct Values {
    pub entries: BTreeMap<String, (Value, Place)>,
    /// Keys with wrong values. They are not missing.
    wrong: Vec<String>,
}

impl Settings {
    pub fn add(&mut self, key: &'static Key, name: &str, raw: Raw, place: Place) {
        self.0.push(Setting { key, name: name.to_owned(), raw, place });
    }

    /// Parses every value. An overridden value is also checked.
    pub fn values(
        self,
        public_key_fault: Option<fn(&str, &str) -> Option<String>>,
        mistakes: &mut Mistakes,
    ) -> Values {
        let mut values = Values::default();
        for key in super::KEYS {
            if let Some(default) = key.default
                && let Ok(value) = value::read(key.kind, &Raw::Untyped(default.to_owned()))
            {
                values.entries.insert(key.name.to_owned(), (value, Place::Default));
            }
        }
        for setting in self.0 {
            match read(&setting, public_key_fault) {
                Ok(value) => {
                    values.entries.insert(setting.name, (value, setting.place));
                }
                Err(problem) => {
                    mistakes.add(&setting.place, &setting.name, problem);
                    // draw no conclusions from a value that a wrong one overrides
                    values.entries.remove(&setting.name);
                    values.wrong.push(setting.name);
                }
            }
        }
        values
    }
}

fn read(
    setting: &Setting,
    public_key_fault: Option<fn(&str, &str) -> Option<String>>,
) -> Result<Value, String> {
    let value = value::read(setting.key.kind, &setting.raw)?;
    let name = setting.name.get(setting.key.name.len() + 1..).unwrap_or_default();
    if matches!(setting.key.kind, Kind::Tokens) && !is_name(name, 1, 100) {
        return Err("must be named by 1 to 100 letters, digits, '.', '_' or '-': the audit log shows it as the actor".into());
    }
    if matches!(setting.key.kind, Kind::SignatureKeys) && !is_name(name, 1, 100) {
        return Err("must be named by 1 to 100 letters, digits, '.', '_' or '-': records name it in their signatures".into());
    }
    if let (Kind::PublicKeys, Some(key)) = (setting.key.kind, value.as_str())
        && let Some(fault) = public_key_fault.and_then(|fault| fault(name, key))
    {
        return Err(format!("is {fault}"));
    }
    Ok(value)
}

impl Values {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.entries.get(name).and_then(|(value, _)| value.as_str())
    }

    /// Where the value was given.
    pub fn place(&self, name: &str) -> Place {
        self.entries.get(name).map_or(Place::Default, |(_, place)| place.clone())
    }

    /// Whether the key has neither a value nor a default.
    pub fn is_missing(&self, name: &str) -> bool {
        !self.entries.contains_key(name) && !self.wrong.iter().any(|wrong| wrong == name)
    }

    /// Whether no entry of the table was given, right or wrong.
    pub fn is_empty_table(&self, name: &str) -> bool {
        let is_entry =
            |full: &String| full.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        !self.entries.keys().chain(&self.wrong).any(is_entry)
    }

    /// The entries of a table by their own names. All values are texts.
    pub fn table<'a>(
        &'a self,
        name: &'a str,
    ) -> impl Iterator<Item = (&'a str, Option<&'a str>, &'a Place)> {
        let entry = move |full: &'a str| full.strip_prefix(name)?.strip_prefix('.');
        self.entries
            .iter()
            .filter_map(move |(full, (value, place))| Some((entry(full)?, value.as_str(), place)))
    }
}
