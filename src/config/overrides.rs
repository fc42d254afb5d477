//! Flags and variables.

use super::file::{inline_table, unknown};
use super::mistakes::{Mistakes, Place};
use super::settings::Settings;
use super::value::Raw;
use super::{KEYS, Key, Kind};

const PREFIX: &str = "TALLYLINE_";

/// Variables with other uses: the first is for `--api`, the others are for the scripts.
const OTHER_VARIABLES: &[&str] =
    &["TALLYLINE_API_TOKEN", "TALLYLINE_TEST_", "TALLYLINE_CACHE", "TALLYLINE_PG_BIN"];

/// Reads each `TALLYLINE_…` variable.
pub(super) fn variables(
    variables: &[(String, String)],
    settings: &mut Settings,
    mistakes: &mut Mistakes,
) {
    for (name, value) in variables {
        if !name.starts_with(PREFIX)
            || OTHER_VARIABLES.iter().any(|other| name.starts_with(other))
            || is_of_kubernetes(name, value)
        {
            continue;
        }
        let place = Place::Variable(name.clone());
        if let Some(key) = KEYS.iter().find(|key| key.variable() == *name) {
            add(key, key.name, value, place, settings, mistakes);
        } else if let Some((key, entry)) =
            KEYS.iter().filter(|key| key.kind.is_table()).find_map(|key| entry_of(key, name))
        {
            match key.kind {
                // librdkafka's names are lower case with dots
                Kind::Properties => {
                    let full = format!("{}.{}", key.name, entry.to_lowercase().replace('_', "."));
                    settings.add(key, &full, Raw::Untyped(value.clone()), place);
                }
                _ => mistakes.add(
                    &place,
                    key.name,
                    format!("cannot be set by a variable for one entry: set the whole table in {}, {{ \"NAME\" = \"…\" }}", key.variable()),
                ),
            }
        } else {
            mistakes.add_without_key(place, "is not a setting: a variable is named TALLYLINE_SECTION_KEY after a key of the pipeline file");
        }
    }
}

/// Whether Kubernetes sets this variable in each pod for a Service named `tallyline` or
/// `tallyline-…`. Source: "Accessing the Service, environment variables" in Kubernetes'
/// documentation, and the older form of Docker links.
pub(super) fn is_of_kubernetes(name: &str, value: &str) -> bool {
    let words: Vec<&str> = name.split('_').skip(1).collect();
    let ends_with = |end: &[&str]| words.ends_with(end);
    let is_port_link = |link: &[&str]| match link {
        ["PORT", number, "TCP" | "UDP" | "SCTP", rest @ ..] => {
            number.parse::<u16>().is_ok() && matches!(rest, [] | ["PROTO" | "PORT" | "ADDR"])
        }
        _ => false,
    };
    ends_with(&["SERVICE", "HOST"])
        || words.windows(2).any(|pair| pair == ["SERVICE", "PORT"])
        || (0..words.len()).any(|start| is_port_link(&words[start..]))
        // the name alone could be a misspelt setting
        || (ends_with(&["PORT"]) && ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme)))
}

fn entry_of<'a>(key: &'static Key, variable: &'a str) -> Option<(&'static Key, &'a str)> {
    let entry = variable.strip_prefix(&key.variable())?.strip_prefix('_')?;
    (!entry.is_empty()).then_some((key, entry))
}

/// Reads each `--set KEY=VALUE`.
pub(super) fn flags(sets: &[String], settings: &mut Settings, mistakes: &mut Mistakes) {
    for (index, set) in sets.iter().enumerate() {
        let place = Place::Flag(index + 1);
        let Some((name, value)) = set.split_once('=') else {
            mistakes.add_without_key(place, "must be KEY=VALUE");
            continue;
        };
        let name = name.trim();
        match Key::of(name) {
            Some(key) => add(key, name, value, place, settings, mistakes),
            None => mistakes.add(&place, name, unknown(name)),
        }
    }
}

fn add(
    key: &'static Key,
    name: &str,
    value: &str,
    place: Place,
    settings: &mut Settings,
    mistakes: &mut Mistakes,
) {
    if !key.kind.is_table() || name != key.name {
        return settings.add(key, name, Raw::Untyped(value.to_owned()), place);
    }
    match inline_table(value) {
        Some(entries) => {
            for (entry, raw) in entries {
                settings.add(key, &format!("{}.{entry}", key.name), raw, place.clone());
            }
        }
        None => mistakes.add(
            &place,
            name,
            format!("must be {} in one line, {{ \"NAME\" = \"…\" }}", key.kind.allowed()),
        ),
    }
}
