//! One TOML file per deployment shape; every key also by flag (`--set KEY=VALUE`) and by variable (`TALLYLINE_KEY`).
//!
//! [`KEYS`] is the one table of keys. [`load`] reads what is given, lays flag over variable over file over default, and answers a
//! [`Pipeline`] or every mistake at once, each with its place.

mod file;
mod given;
mod keys;
mod mistakes;
mod overrides;
mod pipeline;
mod required;
mod secret;
mod token;
mod value;

#[cfg(test)]
mod tests;

pub use keys::{KEYS, Key, Kind};
pub use mistakes::{Mistake, Mistakes, Place};
pub use pipeline::{Collect, Kafka, License, LogBackend, LogKind, Pipeline, PostgresLedger, Publish, PublishMode, Role, Serve, Source};
pub use secret::{Secret, SecretError};
pub use token::{Scope, TokenSetting};

use std::path::PathBuf;

use given::Settings;

/// Where settings come from.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// The pipeline file.
    pub file: PathBuf,
    /// Each `KEY=VALUE`, in the order given: a later one wins.
    pub sets: Vec<String>,
    /// The process's variables. Those whose name does not begin with `TALLYLINE_` are passed over.
    pub variables: Vec<(String, String)>,
    /// What is wrong with a license's public key of this name, if anything: the rule is the license part's.
    pub public_key_fault: Option<fn(&str, &str) -> Option<String>>,
    /// The log part's rule for Kafka's properties, if it is to be applied.
    pub kafka_property_faults: Option<PropertyFaults>,
}

/// What is wrong with properties that are given by name and, where it is written out, value: for each fault the property's index and a text that
/// continues its name and contains no value.
pub type PropertyFaults = fn(&[(&str, Option<&str>)]) -> Vec<(usize, String)>;

/// Reads all settings. A secret is not looked up yet.
pub fn load(input: &Input) -> Result<Pipeline, Mistakes> {
    let mut mistakes = Mistakes::default();
    let mut settings = Settings::default();
    let whole = file::read(&input.file, &mut settings, &mut mistakes);
    overrides::variables(&input.variables, &mut settings, &mut mistakes);
    overrides::flags(&input.sets, &mut settings, &mut mistakes);
    let values = settings.values(input.public_key_fault, &mut mistakes);
    // what a file that could not be read whole leaves out is not missing
    if whole {
        required::check(&values, &input.file, &mut mistakes);
    }
    if let Some(rule) = input.kafka_property_faults {
        required::properties(&values, rule, &mut mistakes);
    }
    if mistakes.is_empty() { Ok(Pipeline::of(&values)) } else { Err(mistakes.sorted()) }
}
