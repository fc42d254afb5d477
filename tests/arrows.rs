//! Checks which part and which external crate a file may name, and that files do not import each
//! other in a circle. It reads the sources, so it cannot be out of date. ARCHITECTURE.md draws the
//! same arrows.

mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sources::{Import, Modules, Source};

/// Each part of `src/` and the parts that it may name. `ANY` parts may name all. Every part but the
/// pure folds may name the leaves. Each other crate of `crates/` is a part.
const ARROWS: &[(&str, &[&str])] = &[
    ("api", ANY),
    ("audit", &["event", "log", "ledger", "coderd", "collectors"]),
    ("cause", &[]),
    ("cli", ANY),
    ("clock", &[]),
    ("coderd", &[]),
    ("collectors", &["event", "log", "coderd", "ledger", "license", "pauses"]),
    ("config", &[]),
    ("consumer", &["event", "log", "ledger", "pauses"]),
    ("event", &[]),
    ("export", &["event", "ledger"]),
    ("ledger", &["event", "pool"]),
    ("license", &[]),
    ("log", &["event", "pool"]),
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
    ("pauses", &["event", "ledger"]),
    ("pool", &[]),
    ("projection", &["stages", "ledger", "event"]),
    ("publisher", &["event", "ledger", "tallyman", "coderd", "license", "pauses"]),
    ("sentences", &["event", "ledger"]),
    ("sim", ANY),
    ("stages", &["event", "license", "metrics"]),
    ("status", &["event", "license", "log", "ledger"]),
    ("tallyman", &["event"]),
    ("retry", &[]),
    ("words", &[]),
];
const ANY: &[&str] = &["*"];
const LEAVES: &[&str] = &["cause", "clock", "retry", "words"];

/// External crates, and the places that may name them.
const EXTERNAL: &[(&str, &[&str])] = &[
    ("rdkafka", &["src/log/kafka/"]),
    ("sqlx", &["src/ledger/", "src/log/postgres/", "src/coderd/", "src/pool.rs", "crates/sim/"]),
];

/// Files elsewhere that name `sqlx`, with the reason.
const SQLX_ELSEWHERE: &[(&str, &str)] = &[
    ("src/cause.rs", "one rule sorts the errors of every database"),
    ("src/cli/connect.rs", "a missing grant is found by the connection's role and database"),
    ("src/cli/exit.rs", "the exit code depends on the database's error"),
    ("src/event/build.rs", "a row is read into the event"),
    ("src/event/usage.rs", "a column is read into a usage type"),
    ("src/event/topic.rs", "a row is read into topic and partition"),
    ("src/log/mod.rs", "the log in PostgreSQL opens on a pool"),
    ("src/words.rs", "a closed set of words is also a column's type"),
];

/// One part names another, in this file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrow {
    from: String,
    to: String,
    file: PathBuf,
}

#[test]
fn no_part_names_a_forbidden_part() {
    let arrows = all_arrows();
    let wrong: Vec<String> = arrows.iter().filter_map(fault).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Far fewer than the real number: enough to notice when reading src/ fails.
    let lines: usize = source_files().iter().map(|source| source.text.lines().count()).sum();
    assert!(arrows.len() >= lines / 1000, "only {} arrows seen in {lines} lines", arrows.len());
}

#[test]
fn every_part_is_listed_and_every_listed_part_exists() {
    let listed: BTreeSet<String> = ARROWS.iter().map(|(part, _)| (*part).to_owned()).collect();
    let existing: BTreeSet<String> =
        source_files().iter().filter_map(|source| part_of(&source.file)).collect();
    assert_eq!(listed, existing);
}

#[test]
fn no_circle_of_files() {
    let circles = circles(&imports(&source_files()));
    assert!(circles.is_empty(), "these files import each other:\n{}", circles.join("\n\n"));
}

#[test]
fn external_crates_are_named_only_where_they_belong() {
    let imports = imports(&source_files());
    let wrong: Vec<String> = imports.iter().filter_map(external_fault).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (file, reason) in SQLX_ELSEWHERE {
        let names = |import: &Import| import.file == Path::new(file) && import.path[0] == "sqlx";
        assert!(
            imports.iter().any(names),
            "{file} no longer names sqlx ({reason}): remove it from the list"
        );
    }
}

#[test]
fn the_reader_sees_every_way_to_name_a_part() {
    let text = "
        use crate::ledger::{self, Batch};
        use crate::{clock::Clock, event::{Event, self}, log};
        fn f<'a>() { crate::coderd::jobs(); $crate::export::csv(); tallyline::audit::all() }
        mod tests { use super::super::super::config::File; }
        // crate::api is only in a comment; \"tallyline::api\" too
        const TEXT: (&str, char) = (r#\"crate::sim \" crate::sim\"#, '\"');
        pub(crate) fn g(x: my_crate::cli) {}
    ";
    let parts = ["audit", "clock", "coderd", "config", "event", "export", "ledger", "log"];
    assert_eq!(named("src/stages/creation.rs", text), parts.map(String::from).into());
    // In the part's own root file, one `super` is already the crate.
    assert_eq!(
        named("src/stages/mod.rs", "use super::ledger::Batch;"),
        ["ledger".to_owned()].into()
    );
    assert_eq!(named("src/stages/creation.rs", "use super::ledger::Batch;"), BTreeSet::new());
    assert_eq!(
        named("crates/sim/src/demo.rs", "use tallyline::log::Log;"),
        ["log".to_owned()].into()
    );
}

#[test]
fn an_import_is_resolved_to_the_file_that_defines_the_item() {
    let targets = |text: &str| {
        let sources = [
            ("src/lib.rs", "pub mod log; pub mod event;"),
            (
                "src/log/mod.rs",
                "mod read; mod batch; pub use batch::{Batch as Records, Next}; pub struct Log;",
            ),
            ("src/log/batch.rs", "pub struct Batch; pub struct Next;"),
            ("src/log/read.rs", text),
            ("src/event.rs", "pub struct Event; pub mod wire { pub struct Form; }"),
        ];
        let sources =
            sources.map(|(file, text)| Source { file: file.into(), text: text.to_owned() });
        let targets = imports(&sources)
            .into_iter()
            .filter(|import| import.file == Path::new("src/log/read.rs"));
        targets
            .filter_map(|import| import.target)
            .map(|file| file.to_string_lossy().into_owned())
            .collect::<BTreeSet<_>>()
    };
    for (text, files) in [
        ("use super::Log;", &["src/log/mod.rs"][..]),
        ("use super::{Records, Next};", &["src/log/batch.rs"]),
        ("use super::batch; fn f() -> batch::Batch {}", &["src/log/batch.rs"]),
        (
            "use crate::log; fn f() { log::Records::new(); log::Log::new() }",
            &["src/log/batch.rs", "src/log/mod.rs"],
        ),
        ("use crate::event::wire::{self, Form}; use sqlx::PgPool;", &["src/event.rs"]),
        ("use super::*;", &["src/log/mod.rs"]),
        ("struct Own; mod tests { use super::*; fn f() { Own::new() } }", &["src/log/read.rs"]),
        ("use super::batch; use super::batch as other;", &[]),
    ] {
        assert_eq!(targets(text), files.iter().map(ToString::to_string).collect(), "{text}");
    }
}

#[test]
fn a_circle_is_found_and_a_re_export_is_not_a_circle() {
    let circles_of = |parent: &str, child: &str| {
        let sources = [
            ("src/log/mod.rs", parent),
            ("src/log/read.rs", child),
            ("src/log/batch.rs", "use super::Log;"),
        ];
        circles(&imports(
            &sources.map(|(file, text)| Source { file: file.into(), text: text.to_owned() }),
        ))
    };
    assert!(
        circles_of("mod read; pub use read::Reader; pub struct Log;", "use super::Log;").is_empty()
    );
    let circle =
        circles_of("mod read; use read::Reader; pub struct Log;", "use super::batch::Batch;");
    assert_eq!(circle.len(), 1);
    for line in [
        "log/mod.rs names log::read::Reader",
        "log/read.rs names log::batch::Batch",
        "log/batch.rs names log::Log",
    ] {
        assert!(circle[0].contains(line), "{}", circle[0]);
    }
}

#[test]
fn a_forbidden_arrow_and_an_unknown_part_are_found() {
    let arrow =
        |from: &str, to: &str| Arrow { from: from.into(), to: to.into(), file: "x.rs".into() };
    assert!(
        fault(&arrow("stages", "ledger"))
            .is_some_and(|text| text.contains("stages may not name ledger"))
    );
    assert!(fault(&arrow("config", "event")).is_some());
    assert!(fault(&arrow("stages", "clock")).is_some());
    assert!(fault(&arrow("stages", "util")).is_some_and(|text| text.contains("no such part")));
    assert!(fault(&arrow("helpers", "event")).is_some_and(|text| text.contains("no such part")));
    for (from, to) in [("stages", "event"), ("ledger", "clock"), ("api", "ledger"), ("log", "log")]
    {
        assert_eq!(fault(&arrow(from, to)), None);
    }
}

#[test]
fn a_misplaced_external_crate_is_found() {
    let named = |file: &str, text: &str| {
        let source = Source { file: file.into(), text: text.to_owned() };
        imports(&[source]).iter().find_map(external_fault)
    };
    for (file, text) in [
        ("src/api/known.rs", "fn f() -> sqlx::Error {}"),
        ("src/log/record.rs", "use {std::fmt, sqlx::PgPool};"),
        ("src/consumer/mod.rs", "use rdkafka::Message as _;"),
        ("src/stages/agents.rs", "use prometheus::Registry;"),
    ] {
        assert!(
            named(file, text).is_some_and(|fault| fault.contains("may not name")),
            "{file}: {text}"
        );
    }
    for (file, text) in [
        ("src/ledger/audit.rs", "use sqlx::PgConnection;"),
        ("src/log/kafka/read.rs", "use rdkafka::Message as _;"),
        ("src/stages/metrics.rs", "use prometheus::proto::MetricFamily;"),
        ("src/api/own.rs", "use prometheus::Registry;"),
    ] {
        assert_eq!(named(file, text), None);
    }
}

/// The problem with an arrow; None: it is allowed.
fn fault(arrow: &Arrow) -> Option<String> {
    let Arrow { from, to, file } = arrow;
    let allowed = |part: &str| ARROWS.iter().find(|(name, _)| *name == part).map(|(_, to)| *to);
    match (allowed(from), allowed(to)) {
        (None, _) => {
            Some(format!("{}: no such part: {from}; list it in tests/arrows.rs", file.display()))
        }
        (_, None) => Some(format!("{}: names {to}: no such part", file.display())),
        _ if from == to || (LEAVES.contains(&to.as_str()) && from != "stages") => None,
        (Some(may), _) if may == ANY || may.contains(&to.as_str()) => None,
        _ => Some(format!("{}: {from} may not name {to}", file.display())),
    }
}

/// The problem with an external crate in a file; None: it is allowed.
fn external_fault(import: &Import) -> Option<String> {
    let (krate, file) = (import.path.first()?, import.file.to_str()?);
    let places = EXTERNAL.iter().find(|(name, _)| name == krate).map(|(_, places)| *places);
    let is_excepted =
        krate == "sqlx" && SQLX_ELSEWHERE.iter().any(|(excepted, _)| *excepted == file);
    let is_misplaced = places
        .is_some_and(|places| !is_excepted && !places.iter().any(|place| file.starts_with(place)));
    // A fold's answer may be a metric, but a fold registers none.
    let registers = krate == "prometheus"
        && file.starts_with("src/stages/")
        && import.path.get(1).is_none_or(|name| name != "proto");
    (is_misplaced || registers).then(|| format!("{file} may not name {}", import.path.join("::")))
}

/// Every arrow between two parts, one for each file that has it.
fn all_arrows() -> BTreeSet<Arrow> {
    let arrow = |import: Import| {
        // lib.rs lists the parts, main.rs wires them.
        Some(Arrow {
            from: part_of(&import.file)?,
            to: part_named(&import.path)?,
            file: import.file,
        })
    };
    imports(&source_files())
        .into_iter()
        .filter_map(arrow)
        .filter(|arrow| arrow.from != arrow.to)
        .collect()
}

/// The parts that a text names outside its own.
fn named(file: &str, text: &str) -> BTreeSet<String> {
    let source = |file: &str, text: &str| Source { file: file.into(), text: text.to_owned() };
    let sources = [source("src/lib.rs", ""), source(file, text)];
    let of_file = imports(&sources).into_iter().filter(|import| import.file == Path::new(file));
    of_file
        .filter_map(|import| part_named(&import.path))
        .filter(|part| part_of(Path::new(file)).as_ref() != Some(part))
        .collect()
}

/// The files that import each other, a text for each circle with the imports in it.
fn circles(imports: &BTreeSet<Import>) -> Vec<String> {
    let mut targets: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
    for import in imports {
        if let Some(target) = import.target.as_deref().filter(|target| *target != import.file) {
            targets.entry(&import.file).or_default().insert(target);
        }
    }
    let reached: BTreeMap<&Path, BTreeSet<&Path>> =
        targets.keys().map(|file| (*file, reached_from(file, &targets))).collect();
    let reaches =
        |from: &Path, to: &Path| reached.get(from).is_some_and(|reached| reached.contains(to));
    let first_of = |file: &Path| {
        reached.keys().copied().find(|other| reaches(file, other) && reaches(other, file))
    };
    let mut circles: BTreeMap<&Path, BTreeSet<String>> = BTreeMap::new();
    for import in imports {
        let Some(target) = import
            .target
            .as_deref()
            .filter(|target| *target != import.file && reaches(target, &import.file))
        else {
            continue;
        };
        let line = format!(
            "{} names {} of {}",
            import.file.display(),
            import.path[1..].join("::"),
            target.display()
        );
        circles.entry(first_of(target).unwrap_or(target)).or_default().insert(line);
    }
    circles.into_values().map(|lines| lines.into_iter().collect::<Vec<_>>().join("\n")).collect()
}

fn reached_from<'a>(
    file: &'a Path,
    targets: &BTreeMap<&'a Path, BTreeSet<&'a Path>>,
) -> BTreeSet<&'a Path> {
    let (mut reached, mut open) = (BTreeSet::new(), vec![file]);
    while let Some(file) = open.pop() {
        open.extend(
            targets.get(file).into_iter().flatten().filter(|target| reached.insert(**target)),
        );
    }
    reached
}

fn imports(sources: &[Source]) -> BTreeSet<Import> {
    Modules::of(sources).imports()
}

/// The tested checkout. cargo passes it when it runs the test: one target folder may serve several
/// checkouts.
fn repository() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test").into()
}

/// The Rust files of `src/` and of each crate's `src/`, with paths relative to the repository.
fn source_files() -> Vec<Source> {
    let repository = repository();
    let crates = std::fs::read_dir(repository.join("crates"))
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path());
    let roots = std::iter::once(repository.clone()).chain(crates).map(|root| root.join("src"));
    let files = roots.filter(|root| root.is_dir()).flat_map(|root| files_below(&root));
    let rust = files.filter(|file| file.extension().is_some_and(|extension| extension == "rs"));
    let source = |file: PathBuf| Source {
        text: std::fs::read_to_string(&file).unwrap(),
        file: file.strip_prefix(&repository).unwrap().to_owned(),
    };
    rust.map(source).collect()
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

/// The part of a file: `log` for `src/log/mod.rs`, `sim` for `crates/sim/src/demo.rs`. None for the
/// files that name all parts.
fn part_of(file: &Path) -> Option<String> {
    let names: Vec<&str> = file.iter().filter_map(|name| name.to_str()).collect();
    match names.as_slice() {
        ["crates", part, ..] => Some((*part).to_owned()),
        ["src", "lib.rs" | "main.rs"] => None,
        ["src", part, ..] => Some(part.trim_end_matches(".rs").to_owned()),
        _ => None,
    }
}

/// The part that a path names.
fn part_named(path: &[String]) -> Option<String> {
    match path {
        [krate, part, ..] if krate == "tallyline" => Some(part.clone()),
        [krate, ..] => krate
            .strip_prefix("tallyline_")
            .map(|part| part.split('/').next().unwrap_or(part).to_owned()),
        [] => None,
    }
}
