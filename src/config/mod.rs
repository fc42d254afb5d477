//! Settings. Each deployment shape has one TOML file; every key may also be given by flag (`--set
//! KEY=VALUE`) or variable (`TALLYLINE_KEY`).
//!
//! [`KEYS`] is the only table of keys. [`load`] returns a [`Pipeline`], or every mistake with its
//! place. A flag overrides a variable, which overrides the file, which overrides the default.

mod file;
mod keys;
mod mistakes;
mod overrides;
mod pipeline;
mod required;
mod secret;
mod settings;
mod token;
mod value;

#[cfg(test)]
mod tests;

pub use keys::{KEYS, Key, Kind};
pub use mistakes::{Mistake, Mistakes, Place};
pub use pipeline::{
    Collect, Kafka, License, LogBackend, LogKind, Pipeline, PostgresLedger, Publish, PublishMode,
    Role, Serve, Source,
};
pub use required::PropertyFaults;
pub use secret::{Secret, SecretError};
pub use token::{Scope, TokenSetting};

use std::path::PathBuf;

use settings::Settings;

/// Sources of settings.
#[derive(Clone, Debug, Default)]
pub struct Input {
    pub file: PathBuf,
    /// Each `KEY=VALUE` in the given order. A later one overrides an earlier one.
    pub sets: Vec<String>,
    /// The variables of the environment. Those without the prefix `TALLYLINE_` are ignored.
    pub variables: Vec<(String, String)>,
    /// The license part's check of a public key with its name. Returns the fault, if any.
    pub public_key_fault: Option<fn(&str, &str) -> Option<String>>,
    /// The log part's check of Kafka's properties, if it is to be applied.
    pub kafka_property_faults: Option<PropertyFaults>,
}

/// Reads all settings without resolving secrets.
pub fn load(input: &Input) -> Result<Pipeline, Mistakes> {
    let mut mistakes = Mistakes::default();
    let mut settings = Settings::default();
    let complete = file::read(&input.file, &mut settings, &mut mistakes);
    overrides::variables(&input.variables, &mut settings, &mut mistakes);
    overrides::flags(&input.sets, &mut settings, &mut mistakes);
    let values = settings.values(input.public_key_fault, &mut mistakes);
    // a setting may seem to be missing only because a part of the file could not be read
    if complete {
        required::check(&values, &input.file, &mut mistakes);
    }
    if let Some(rule) = input.kafka_property_faults {
        required::properties(&values, rule, &mut mistakes);
    }
    if mistakes.is_empty() { Ok(Pipeline::of(&values)) } else { Err(mistakes.sorted()) }
}
