//! Checks which part may name which. It reads the sources, so it cannot be out of date. ARCHITECTURE.md draws the same arrows.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Each part of `src/` and the parts that it may name. `ANY` parts may name all. Every part but the pure folds may name the leaves.
const ARROWS: &[(&str, &[&str])] = &[
    ("api", ANY),
    ("audit", &["event", "log", "ledger", "coderd", "collectors"]),
    ("cause", &[]),
    ("cli", ANY),
    ("clock", &[]),
    ("coderd", &[]),
    ("collectors", &["event", "log", "coderd", "ledger", "license"]),
    ("config", &[]),
    ("consumer", &["event", "log", "ledger"]),
    ("event", &[]),
    ("export", &["event", "ledger"]),
    ("ledger", &["event"]),
    ("license", &[]),
    ("log", &["event"]),
    ("metrics", &[]),
    (
        "operations",
        &[
            "audit",
            "coderd",
            "collectors",
            "consumer",
            "event",
            "export",
            "ledger",
            "license",
            "log",
            "metrics",
            "projection",
            "publisher",
            "stages",
            "status",
        ],
    ),
    ("projection", &["stages", "ledger", "event"]),
    ("publisher", &["event", "ledger", "tallyman", "coderd", "license"]),
    ("stages", &["event", "license", "metrics"]),
    ("status", &["event", "license", "log", "ledger"]),
    ("tallyman", &["event"]),
    ("waiting", &[]),
    ("words", &[]),
];
const ANY: &[&str] = &["*"];
const LEAVES: &[&str] = &["cause", "clock", "waiting", "words"];

/// One part names another, in this file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrow {
    from: String,
    to: String,
    file: PathBuf,
}

#[test]
fn no_part_names_what_it_may_not() {
    let arrows = all_arrows();
    let wrong: Vec<String> = arrows.iter().filter_map(fault).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Far fewer than the real number: enough to notice when reading src/ fails.
    let lines: usize = source_files().iter().map(|(_, text)| text.lines().count()).sum();
    assert!(arrows.len() >= lines / 1000, "only {} arrows seen in {lines} lines", arrows.len());
}

#[test]
fn every_part_is_listed_and_every_listed_part_is_there() {
    let listed: BTreeSet<String> = ARROWS.iter().map(|(part, _)| (*part).to_owned()).collect();
    let there: BTreeSet<String> = source_files().iter().filter_map(|(file, _)| part_of(file)).collect();
    assert_eq!(listed, there);
}

#[test]
fn the_reader_sees_every_way_to_name_a_part() {
    let text = "
        use crate::ledger::{self, Batch};
        use crate::{clock::Clock, event::{Event, self}, log};
        fn f() { crate::coderd::jobs(); $crate::export::csv(); tallyline::audit::all() }
        mod tests { use super::super::config::File; }
        // crate::api is only talked of; https://example.org/crate::demo too
        pub(crate) fn g(x: my_crate::cli) {}
    ";
    let named = names(text, Path::new("stages/creation.rs"));
    assert_eq!(named, ["audit", "clock", "coderd", "config", "event", "export", "ledger", "log"].map(String::from).into());
    // In the part's own root file, one `super` is already the crate.
    assert_eq!(names("use super::ledger::Batch;", Path::new("stages/mod.rs")), ["ledger".to_owned()].into());
    assert_eq!(names("use super::ledger::Batch;", Path::new("stages/creation.rs")), BTreeSet::new());
}

#[test]
fn a_forbidden_arrow_and_an_unknown_part_are_found() {
    let arrow = |from: &str, to: &str| Arrow { from: from.into(), to: to.into(), file: "x.rs".into() };
    assert!(fault(&arrow("stages", "ledger")).is_some_and(|text| text.contains("stages may not name ledger")));
    assert!(fault(&arrow("config", "event")).is_some());
    assert!(fault(&arrow("stages", "clock")).is_some());
    assert!(fault(&arrow("stages", "util")).is_some_and(|text| text.contains("no such part")));
    assert!(fault(&arrow("helpers", "event")).is_some_and(|text| text.contains("no such part")));
    for (from, to) in [("stages", "event"), ("ledger", "clock"), ("api", "ledger"), ("log", "log")] {
        assert_eq!(fault(&arrow(from, to)), None);
    }
}

/// The problem with an arrow; None: it is allowed.
fn fault(arrow: &Arrow) -> Option<String> {
    let Arrow { from, to, file } = arrow;
    let allowed = |part: &str| ARROWS.iter().find(|(name, _)| *name == part).map(|(_, to)| *to);
    match (allowed(from), allowed(to)) {
        (None, _) => Some(format!("{}: no such part: {from}; list it in tests/arrows.rs", file.display())),
        (_, None) => Some(format!("{}: names {to}: no such part", file.display())),
        _ if from == to || (LEAVES.contains(&to.as_str()) && from != "stages") => None,
        (Some(may), _) if may == ANY || may.contains(&to.as_str()) => None,
        _ => Some(format!("{}: {from} may not name {to}", file.display())),
    }
}

/// Every arrow between two parts, one for each file that has it.
fn all_arrows() -> BTreeSet<Arrow> {
    let mut arrows = BTreeSet::new();
    for (file, text) in source_files() {
        let Some(from) = part_of(&file) else { continue }; // lib.rs lists the parts, main.rs wires them
        for to in names(&text, &file).into_iter().filter(|to| *to != from) {
            arrows.insert(Arrow { from: from.clone(), to, file: file.clone() });
        }
    }
    arrows
}

/// The tested checkout. cargo passes it when it runs the test: one target folder may serve several checkouts.
fn repository() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test").into()
}

/// The Rust files of `src/`, with paths relative to it.
fn source_files() -> Vec<(PathBuf, String)> {
    let source = repository().join("src");
    let rust = files_below(&source).into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs"));
    rust.map(|file| (file.strip_prefix(&source).unwrap().to_owned(), std::fs::read_to_string(&file).unwrap())).collect()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// The part of a file in `src/`: `log` for `log/kafka.rs` and for `log.rs`. None for the two files that name all parts.
fn part_of(file: &Path) -> Option<String> {
    let part = Path::new(file.iter().next()?).file_stem()?.to_str()?;
    (part != "lib" && part != "main").then(|| part.to_owned())
}

/// The parts in a file's text: after `crate::`, the crate's own name, or the number of `super::` that leaves its part.
fn names(text: &str, file: &Path) -> BTreeSet<String> {
    let code: String = text.lines().map(|line| without_comment(line).to_owned() + "\n").collect();
    let mut found = BTreeSet::new();
    for root in ["crate::", "tallyline::"] {
        for (at, _) in code.match_indices(root) {
            let inside_a_word = code[..at].chars().next_back().is_some_and(|before| before.is_alphanumeric() || before == '_');
            if !inside_a_word {
                found.extend(first_names(&code[at + root.len()..]));
            }
        }
    }
    let file_name = file.file_stem().unwrap_or_default();
    let depth = file.iter().count() - usize::from(file_name == "mod");
    let listed = |name: &String| ARROWS.iter().any(|(part, _)| part == name);
    for (at, _) in code.match_indices("super::") {
        let supers = code[at..].split("super::").take_while(|between| between.is_empty()).count();
        if supers >= depth {
            found.extend(first_names(&code[at + supers * "super::".len()..]).into_iter().filter(listed));
        }
    }
    found
}

/// The line up to `//`, unless that is part of an address.
fn without_comment(line: &str) -> &str {
    let comment = line.match_indices("//").find(|(at, _)| !line[..*at].ends_with(':'));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// The first name of a path, or of each path in the braces. Macros, functions and types at the crate's root have no part.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(list) = path.strip_prefix('{') else { return vec![name(path)] };
    let mut names = vec![name(list)];
    let mut depth = 0;
    for (at, character) in list.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(name(&list[at + 1..])),
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}
