//! Checks the table of bad inputs: every test in it exists.

#[path = "../../reference/bad_input_rows.rs"]
mod bad_input_rows;

use std::path::{Path, PathBuf};

use bad_input_rows::ROWS;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.extension() {
            _ if path.is_dir() => sources(&path, files),
            Some(kind) if kind == "rs" => files.push(path),
            _ => {}
        }
    }
}

/// The names of all functions that cargo runs as tests, with repetitions.
pub fn tests() -> Vec<String> {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    sources(&root().join("tests"), &mut files);
    let mut names = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            let function = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn "));
            match function.and_then(|rest| rest.split_once('(')) {
                Some((name, _)) => {
                    if is_test {
                        names.push(name.to_owned());
                    }
                    is_test = false;
                }
                None => is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test"),
            }
        }
    }
    names
}

#[test]
fn every_row_names_a_test_of_its_own_that_exists() {
    let tests = tests();
    let named: Vec<&str> = ROWS.iter().map(|row| row.test).collect();
    for name in &named {
        assert_eq!(tests.iter().filter(|test| test == name).count(), 1, "tests named {name}");
        assert_eq!(named.iter().filter(|other| other == &name).count(), 1, "rows that name {name}");
    }
    for row in ROWS {
        assert!(!row.input.is_empty() && !row.result.text().is_empty(), "a row without a text");
    }
    // the other direction: the table names every test here
    let here = include_str!("records.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("async fn ")?.split_once('('))
        .map(|(name, _)| name);
    let left_out: Vec<&str> = here.filter(|name| !named.contains(name)).collect();
    assert_eq!(left_out, Vec::<&str>::new(), "not in the table");
}
