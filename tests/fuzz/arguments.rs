//! Command lines: instants, durations, ranges, numbers, ids.

use chrono::Datelike as _;
use clap::Parser as _;
use clap::error::ErrorKind;
use tallyline::cli::Cli;

/// The arguments, one a line.
pub fn command_line(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let arguments = std::iter::once("tallyline").chain(text.trim_end_matches('\n').split('\n'));
    match Cli::try_parse_from(arguments) {
        Ok(cli) => {
            // the flags' time is within some hundred years of now, as the ledger can store it
            assert!((1900..2200).contains(&cli.global.clock().now().year()));
            assert!(!format!("{:?}", cli.command).is_empty());
            true
        }
        Err(error) => {
            let rendered = error.to_string();
            let is_help =
                matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            assert!(is_help || !rendered.is_empty(), "{:?}", error.kind());
            false
        }
    }
}
