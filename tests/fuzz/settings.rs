//! Pipeline files, settings by flag and variable, the ledger's snapshots, closed sets of words.

use std::io::Write as _;
use std::path::Path;

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

/// Pieces of a snapshot: lines of a name, a space, and the content with `\\xNN` for a byte. An
/// unreadable one restarts the fold; readable ones are unchanged by saving.
pub fn snapshot(input: &[u8]) -> bool {
    restores::<MetricsState>(input) | restores::<LicensesState>(input)
}

fn restores<S: Stage + PartialEq + std::fmt::Debug>(input: &[u8]) -> bool {
    let Some(state) = restored::<S>(input) else { return false };
    let mut again = S::default();
    for piece in state.pieces().into_iter().rev() {
        let content = state.encode(piece).expect("a piece");
        again.decode(piece, &content).expect("readable");
    }
    assert_eq!(again, state);
    true
}

fn restored<S: Stage>(input: &[u8]) -> Option<S> {
    let mut state = S::default();
    let lines: Vec<&[u8]> =
        input.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    for line in lines.iter().rev() {
        let end = line.iter().position(|byte| *byte == b' ')?;
        let name = std::str::from_utf8(&line[..end]).ok()?;
        state.decode(name.parse().ok()?, &unescaped(&line[end + 1..])).ok()?;
    }
    Some(state)
}

/// The bytes, with `\\xNN` replaced by that byte, and other escapes by the character after them.
fn unescaped(mut text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some((first, rest)) = text.split_first() {
        text = rest;
        let hex = rest.get(1..3).filter(|_| rest.starts_with(b"x"));
        let byte = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match (first, byte, rest.first()) {
            (b'\\', Some(byte), _) => {
                bytes.push(byte);
                text = &rest[3..];
            }
            (b'\\', None, Some(escaped)) => {
                bytes.push(*escaped);
                text = &rest[1..];
            }
            _ => bytes.push(*first),
        }
    }
    bytes
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
