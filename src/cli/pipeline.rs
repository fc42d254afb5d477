//! The pipeline file of a command.

use std::path::PathBuf;

use super::{Exit, Failure};
use crate::config::{self, Input, Mistakes, Pipeline};
use crate::license::PublicKeys;

/// Where a command's settings come from.
#[derive(Clone, Debug, clap::Args)]
pub struct PipelineArguments {
    /// The pipeline file, such as pipelines/single.toml
    #[arg(long, value_name = "FILE")]
    pub pipeline: PathBuf,
    /// A setting over variable and file, such as collect.poll_seconds=1; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl PipelineArguments {
    /// The settings, checked.
    ///
    /// # Errors
    /// All mistakes at once, as [`Exit::Configuration`].
    pub fn load(&self) -> Result<Pipeline, Failure> {
        self.read().map_err(|mistakes| Failure::of(Exit::Configuration, format!("the settings are wrong:\n{mistakes}")))
    }

    /// The settings, or all mistakes.
    ///
    /// # Errors
    /// The mistakes.
    pub(super) fn read(&self) -> Result<Pipeline, Mistakes> {
        let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        config::load(&Input {
            file: self.pipeline.clone(),
            sets: self.set.clone(),
            variables: std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect(),
            public_key_fault: Some(|name, key| PublicKeys::new().add(name, key).err().map(|error| format!("refused: {}", error.reason))),
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{KEYS, Kind};
    use crate::license::RuleSet;

    #[test]
    fn every_rule_set_that_the_settings_allow_is_one() {
        let rules = KEYS.iter().find(|key| key.name == "license.rules").expect("a key");
        let Kind::Choice(words) = rules.kind else { panic!("no choice") };
        assert!(words.iter().all(|word| word.parse::<RuleSet>().is_ok()));
    }
}
