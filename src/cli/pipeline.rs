//! Loads the pipeline file of a command.

use std::path::PathBuf;

use super::{Exit, Failure};
use crate::config::{self, Input, KEYS, Mistakes, Pipeline};
use crate::license::{PublicKeys, RuleSet, UnknownRuleSet};

/// Sources of a command's settings.
#[derive(Clone, Debug, clap::Args)]
pub struct PipelineArguments {
    /// Pipeline file, such as pipelines/single.toml
    #[arg(long, value_name = "FILE")]
    pub pipeline: PathBuf,
    /// Setting that overrides variables and the file, such as collect.poll_seconds=1; may be
    /// repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl PipelineArguments {
    /// The checked settings.
    pub fn load(&self) -> Result<Pipeline, Failure> {
        self.read().map_err(|mistakes| {
            Failure::of(Exit::Configuration, format!("the settings are wrong:\n{mistakes}"))
        })
    }

    /// The settings, or all their mistakes.
    pub(super) fn read(&self) -> Result<Pipeline, Mistakes> {
        let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        config::load(&Input {
            file: self.pipeline.clone(),
            sets: self.set.clone(),
            variables: std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect(),
            public_key_fault: Some(|name, key| {
                PublicKeys::new()
                    .add(name, key)
                    .err()
                    .map(|error| format!("refused: {}", error.reason))
            }),
            kafka_property_faults: Some(crate::log::property_faults),
        })
    }
}

pub fn license_rules(pipeline: &Pipeline) -> Result<RuleSet, Failure> {
    pipeline
        .license
        .rules
        .parse()
        .map_err(|error: UnknownRuleSet| Failure::new(Exit::Configuration, error))
}

impl PipelineArguments {
    /// The same flags for another command, quoted for a shell. Possible secrets are omitted.
    #[must_use]
    pub(super) fn again(&self) -> String {
        let mut words = format!("--pipeline {}", quoted(&self.pipeline.to_string_lossy()));
        for set in &self.set {
            let name = set.split('=').next().unwrap_or_default();
            let secret = KEYS
                .iter()
                .any(|key| key.kind.may_be_secret() && name.trim().starts_with(key.name));
            words.push_str(" --set ");
            words.push_str(&if secret { format!("{}=***", quoted(name)) } else { quoted(set) });
        }
        words
    }
}

/// One quoted word for a POSIX shell.
pub(super) fn quoted(word: &str) -> String {
    let plain = !word.is_empty()
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-./=:,@%+".contains(&byte));
    if plain { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::PipelineArguments;
    use crate::config::{KEYS, Kind};
    use crate::license::RuleSet;

    #[test]
    fn the_flags_can_be_given_again_and_show_no_secret() {
        let set = [
            "log.kind=kafka",
            "kafka.topic_prefix=it's",
            "ledger.url=postgres://u:hunter2@h/d",
            "kafka.properties.sasl.password=hunter2",
        ];
        let arguments = PipelineArguments {
            pipeline: "my pipelines/a.toml".into(),
            set: set.map(str::to_owned).to_vec(),
        };
        let expected = r"--pipeline 'my pipelines/a.toml' --set log.kind=kafka --set 'kafka.topic_prefix=it'\''s' --set ledger.url=*** --set kafka.properties.sasl.password=***";
        assert_eq!(arguments.again(), expected);
    }

    #[test]
    fn every_rule_set_that_the_settings_allow_is_one() {
        let rules = KEYS.iter().find(|key| key.name == "license.rules").expect("a key");
        let Kind::Choice(words) = rules.kind else { panic!("no choice") };
        assert!(words.iter().all(|word| word.parse::<RuleSet>().is_ok()));
    }
}
