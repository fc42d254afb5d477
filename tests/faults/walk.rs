//! Types the steps of docs/after-an-outage.md: fills in the placeholders, gives each command to a
//! shell, and compares its output with the page.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::process::{Process, bound};
use crate::support::setting;

/// The time limit of one command on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Words in capitals on the page. Some are known from the start, others come from answers.
const PLACEHOLDERS: [&str; 10] = [
    "LEDGER_URL",
    "LEDGER_NAME",
    "LEDGER_ROLE",
    "SERVER_URL",
    "PLAN_HASH",
    "REPLAY_HASH",
    "REJECT_ID",
    "JUNK_ID",
    "EVENT_ID",
    "UNITS",
];

/// A command of the page, and its output there.
#[derive(Debug, PartialEq)]
struct PageCommand {
    command: String,
    lines: Vec<String>,
}

pub struct Walk {
    remaining: VecDeque<PageCommand>,
    values: BTreeMap<&'static str, String>,
    folder: TempDir,
    last: String,
}

/// A command that keeps running.
pub struct Running {
    pub process: Process,
    page_command: PageCommand,
}

impl Walk {
    /// Runs in a folder with this pipeline file under the page's name.
    pub fn begin(pipeline: &str, values: [(&'static str, String); 4]) -> Walk {
        let page = std::fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/docs/after-an-outage.md"
        ))
        .expect("the page");
        let folder = TempDir::new().expect("a folder");
        std::fs::copy(pipeline, folder.path().join("kafka.toml")).expect("the pipeline file");
        Walk {
            remaining: commands(&page, "Steps"),
            values: values.into(),
            folder,
            last: String::new(),
        }
    }

    /// Runs the page's next command, which must start with these words and exit with 0. Returns its
    /// output, which must match the page.
    pub async fn run(&mut self, begin: &str) -> String {
        let page_command = self.next(begin);
        let begun = Instant::now();
        let mut process = self.shell("");
        let status = process.ends_within(SOON).await;
        assert!(
            status.success(),
            "{}: {status}\n{}{}",
            self.last,
            process.stdout(),
            process.stderr()
        );
        eprintln!("  {:.1?}  $ {}", begun.elapsed(), self.last);
        self.compare(&page_command, &process.stdout());
        process.stdout()
    }

    /// Starts the page's next command, which must start with these words.
    pub fn start(&mut self, begin: &str) -> Running {
        let page_command = self.next(begin);
        // replaces the shell, so that Ctrl-C reaches the command
        Running { process: self.shell("exec "), page_command }
    }

    fn next(&mut self, begin: &str) -> PageCommand {
        let page_command = self
            .remaining
            .pop_front()
            .unwrap_or_else(|| panic!("the page has no command after {:?}", self.last));
        assert!(
            page_command.command.starts_with(begin),
            "{begin:?} should come next, the page has {:?}",
            page_command.command
        );
        self.last = filled(&page_command.command, &self.values);
        assert!(
            !PLACEHOLDERS.iter().any(|name| self.last.contains(name)),
            "unknown placeholder in the command: {}",
            self.last
        );
        page_command
    }

    /// Sends Ctrl-C; the command must succeed.
    pub async fn interrupt(&mut self, Running { mut process, page_command }: Running) {
        process.signal("INT");
        let status = process.ends_within(SOON).await;
        assert!(status.success(), "{}: {status}\n{}", self.last, process.stderr());
        self.compare(&page_command, &process.stdout());
    }

    pub async fn again(&self) -> String {
        let mut process = self.shell("");
        let status = process.ends_within(SOON).await;
        assert!(status.success(), "{}: {status}\n{}", self.last, process.stderr());
        process.stdout()
    }

    /// The value of this placeholder.
    pub fn value(&self, name: &str) -> &str {
        &self.values[name]
    }

    /// Checks that the page has no more commands.
    pub fn end(self) {
        assert_eq!(self.remaining, [], "the page has more commands");
    }

    fn shell(&self, prefix: &str) -> Process {
        let tallyline =
            Path::new(env!("CARGO_BIN_EXE_tallyline")).parent().expect("a folder").display();
        let path = format!(
            "{tallyline}:{}:{}",
            setting("TALLYLINE_TEST_POSTGRES_BIN"),
            std::env::var("PATH").expect("a path")
        );
        let mut command: Command = bound("sh", "KILL");
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TALLYLINE_"))
        {
            command.env_remove(name);
        }
        command
            .args(["-c", &format!("{prefix}{}", self.last)])
            .env("PATH", path)
            .current_dir(self.folder.path());
        Process::spawn(command)
    }

    /// Checks that the output has every line of the page, in this order. Learns unknown
    /// placeholders.
    fn compare(&mut self, page_command: &PageCommand, output: &str) {
        let mut output_lines = output.lines();
        for line in &page_command.lines {
            let expected = filled(line, &self.values);
            let expected: Vec<&str> = expected.split_whitespace().collect();
            let matches = output_lines.find_map(|line| {
                match_words(&expected, &line.split_whitespace().collect::<Vec<_>>())
            });
            let Some(matches) = matches else {
                panic!("{}: the page shows {line:?}, and the output is\n{output}", self.last)
            };
            self.values.extend(matches);
        }
    }
}

/// The commands of one section: indented lines after a `$`, each with the lines below it.
fn commands(page: &str, heading: &str) -> VecDeque<PageCommand> {
    let section = page
        .split("\n## ")
        .find_map(|section| section.strip_prefix(heading)?.strip_prefix('\n'))
        .expect("the section");
    let mut commands = VecDeque::<PageCommand>::new();
    for line in section.lines().filter_map(|line| line.strip_prefix("    ")) {
        match (line.strip_prefix("$ "), commands.back_mut()) {
            (Some(command), _) => {
                commands.push_back(PageCommand { command: command.to_owned(), lines: Vec::new() })
            }
            (None, Some(command)) => command.lines.push(line.to_owned()),
            (None, None) => panic!("{line:?} is shown by no command"),
        }
    }
    commands
}

fn filled(text: &str, values: &BTreeMap<&'static str, String>) -> String {
    values.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// Compares words; `…` matches any words, or the rest of one. Returns the words at placeholders, or
/// None.
fn match_words(expected: &[&str], words: &[&str]) -> Option<Vec<(&'static str, String)>> {
    match (expected, words) {
        ([], []) => Some(Vec::new()),
        (["…", rest @ ..], _) => {
            (0..=words.len()).find_map(|skipped| match_words(rest, &words[skipped..]))
        }
        ([first, rest @ ..], [word, words @ ..]) => {
            let placeholder = PLACEHOLDERS.into_iter().find(|name| name == first);
            let is_it = match first.strip_suffix('…') {
                Some(begin) => word.starts_with(begin),
                None => word == first || placeholder.is_some(),
            };
            let mut matches = match_words(rest, words).filter(|_| is_it)?;
            matches.extend(placeholder.map(|name| (name, (*word).to_owned())));
            Some(matches)
        }
        _ => None,
    }
}

#[test]
fn a_page_is_parsed_and_compared_with_the_output() {
    let page = "# A\n## Before\n    $ no\n## It\n\nText `$ no`.\n\n    $ one X\n    a b\n\n    $ two\n## After\n    $ no\n";
    let of = |command: &str, lines: &[&str]| PageCommand {
        command: command.to_owned(),
        lines: lines.iter().map(|line| (*line).to_owned()).collect(),
    };
    assert_eq!(commands(page, "It"), [of("one X", &["a b"]), of("two", &[])]);
    let learn = |expected: &str, output: &str| {
        match_words(
            &expected.split_whitespace().collect::<Vec<_>>(),
            &output.split_whitespace().collect::<Vec<_>>(),
        )
    };
    assert_eq!(learn("a … c… d", "a x y cc d"), Some(vec![]));
    assert_eq!(learn("UNITS …", "3"), Some(vec![("UNITS", "3".to_owned())]));
    for (expected, output) in
        [("a", "a b"), ("a b", "a"), ("a", "b"), ("a … c", "a b"), ("b…", "cb"), ("", "a")]
    {
        assert_eq!(learn(expected, output), None, "{expected:?} {output:?}");
    }
}
