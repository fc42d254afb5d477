//! Makes the pages of docs/reference/ from the code, and fails if one of them is stale.
//! `scripts/reference` writes them.

mod api;
mod bad_input;
mod bad_input_rows;
mod cli;
mod config;
mod metrics;
mod table;

use std::path::Path;

/// If this variable is `write`, the pages are written instead of compared.
const VARIABLE: &str = "TALLYLINE_REFERENCE";
const FIRST_LINE: &str = "<!-- Generated from the code by scripts/reference. Do not edit. -->\n";

#[test]
fn the_page_of_commands_is_current() {
    check("cli.md", &cli::page());
}

#[test]
fn the_page_of_settings_is_current() {
    check("config.md", &config::page());
}

#[test]
fn the_page_of_metrics_is_current() {
    check("metrics.md", &metrics::page());
}

#[test]
fn the_page_of_the_api_is_current() {
    check("api.md", &api::page());
}

#[test]
fn the_page_of_bad_input_is_current() {
    check("bad-input.md", &bad_input::page());
}

fn check(name: &str, content: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference").join(name);
    let page = format!("{FIRST_LINE}\n{}\n", content.trim_end());
    if std::env::var(VARIABLE).is_ok_and(|value| value == "write") {
        return std::fs::write(&file, page).unwrap();
    }
    let before = std::fs::read_to_string(&file).unwrap_or_default();
    let same = before.lines().zip(page.lines()).take_while(|(before, now)| before == now).count();
    assert!(
        before == page,
        "docs/reference/{name}, line {}: not what the code says; run scripts/reference",
        same + 1
    );
}
