//! Pipeline files, settings by flag and variable, the ledger's snapshots, closed sets of words.

use std::io::Write as _;
use std::path::Path;

use serde::de::DeserializeOwned;
use tallyline::config::{self, Input};
use tallyline::event::{BuildStatus, InputStage, Topic, Transition, UsageType};
use tallyline::license::RuleSet;
use tallyline::stages::{LicensesState, MetricsState, Stage};

pub fn file(input: &[u8]) -> bool {
    with_file(input, |file| loads(&Input { file: file.to_owned(), ..Input::default() }))
}

/// One setting a line: `KEY=VALUE` for flags, `TALLYLINE_KEY=VALUE` for variables.
pub fn flags(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let (variables, sets): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|line| line.starts_with("TALLYLINE_"));
    let variable = |line: &str| {
        line.split_once('=')
            .map_or((line.to_owned(), String::new()), |(name, value)| (name.into(), value.into()))
    };
    with_file(b"roles = ['consume']\nledger.url = 'postgres://h/d'\n", |file| {
        loads(&Input {
            file: file.to_owned(),
            sets: sets.iter().map(|set| (*set).to_owned()).collect(),
            variables: variables.into_iter().map(variable).collect(),
            public_key_fault: None,
            kafka_property_faults: Some(tallyline::log::property_faults),
        })
    })
}

fn with_file(text: &[u8], read: impl FnOnce(&Path) -> bool) -> bool {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(text).expect("written");
    read(file.path())
}

/// Checks that it gives settings, or mistakes that each have a place and a problem.
fn loads(input: &Input) -> bool {
    match config::load(input) {
        Ok(_) => true,
        Err(mistakes) => {
            assert!(!mistakes.is_empty());
            assert!(mistakes.iter().all(|mistake| !mistake.problem.is_empty()));
            assert!(mistakes.to_string().lines().count() >= mistakes.iter().count());
            false
        }
    }
}

/// A snapshot's state. An unreadable one is skipped and the fold starts again; a readable one is
/// unchanged by saving.
pub fn snapshot(input: &[u8]) -> bool {
    restores::<MetricsState>(input) | restores::<LicensesState>(input)
}

fn restores<S: Stage + DeserializeOwned + PartialEq + std::fmt::Debug>(input: &[u8]) -> bool {
    let Ok(state) = serde_json::from_slice::<S>(input) else { return false };
    let again = serde_json::to_vec(&state).expect("JSON");
    assert_eq!(serde_json::from_slice::<S>(&again).expect("readable"), state);
    true
}

/// A word of a closed set: a parsed word is written the same.
pub fn words(input: &[u8]) -> bool {
    let Ok(word) = std::str::from_utf8(input) else { return false };
    let word = word.trim_end_matches('\n');
    let written = [
        word.parse::<Topic>().ok().map(|topic| topic.name().to_owned()),
        word.parse::<Transition>().ok().map(|one| one.as_str().to_owned()),
        word.parse::<BuildStatus>().ok().map(|one| one.as_str().to_owned()),
        word.parse::<InputStage>().ok().map(|one| one.as_str().to_owned()),
        word.parse::<UsageType>().ok().map(|one| one.as_str().to_owned()),
        word.parse::<RuleSet>().ok().map(|_| word.to_owned()),
    ];
    assert!(written.iter().flatten().all(|written| written == word));
    written.iter().any(Option::is_some)
}
