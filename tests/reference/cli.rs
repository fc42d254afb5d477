//! docs/reference/cli.md: each command with its help.

use clap::{Arg, Command, CommandFactory as _};
use tallyline::cli::{Cli, EXIT_CODES};

use crate::table::{code, codes, link, table};

const INTRODUCTION: &str = "\
# Commands

A command works on the databases of a pipeline file (`--pipeline FILE`). Most commands can ask a
serving process instead: `--api URL`, with a token in `--token SECRET` or `TALLYLINE_API_TOKEN`.
";

const DEMO: &str = "\
## The demo

`scripts/demo [--for 20s]` builds and runs another program, `tallyline-demo`: everything with
simulated traffic, in one process. `tallyline-demo coderd-sim` and `tallyline-demo tallyman-sim` run
the two simulators by themselves. `tallyline-demo --help` shows the options.
";

pub fn page() -> String {
    let mut root = Cli::command();
    root.build();
    let mut commands = Vec::new();
    add_leaves(&root, &mut commands);
    let effects =
        commands.iter().map(|command| [link(&code(name(command)), name(command)), about(command)]);
    let mut page = format!(
        "{INTRODUCTION}\n{}\n## Global options\n\nEvery command has these options. Answers go to stdout, everything else to stderr.\n\n{}\n\
         ## Exit codes\n\n{}\n{DEMO}",
        table(["command", "effect"], effects),
        table(["option", "effect"], globals(&root).map(|option| [usage(option), effect(option)])),
        table(["code", "meaning"], exit_codes()),
    );
    for command in &commands {
        page += &format!("\n## {}\n\n```text\n{}\n```\n", name(command), help(&root, command));
    }
    page
}

/// The commands without subcommands, in the order of the help.
fn add_leaves(command: &Command, leaves: &mut Vec<Command>) {
    let shown = |command: &&Command| !command.is_hide_set() && command.get_name() != "help";
    for command in command.get_subcommands().filter(shown) {
        if command.has_subcommands() {
            add_leaves(command, leaves);
        } else {
            leaves.push(command.clone());
        }
    }
}

/// The command with its parents: `tallyline rejects list`.
fn name(command: &Command) -> &str {
    command.get_bin_name().expect("a built command")
}

fn about(command: &Command) -> String {
    command.get_about().expect("a command has a description").to_string()
}

fn globals(root: &Command) -> impl Iterator<Item = &Arg> {
    root.get_arguments().filter(|option| option.is_global_set() && !option.is_hide_set())
}

/// The help of a command, without the options that every command has.
fn help(root: &Command, command: &Command) -> String {
    let is_everywhere = |option: &Arg| {
        let id = option.get_id();
        id == "help"
            || root.get_arguments().any(|other| other.is_global_set() && other.get_id() == id)
    };
    let own = command.clone().mut_args(|option| {
        let hidden = option.is_hide_set() || is_everywhere(&option);
        option.hide(hidden)
    });
    let help = own.clone().render_long_help().to_string();
    help.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim().to_owned()
}

fn usage(option: &Arg) -> String {
    let short = option.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    let value = option.get_value_names().map(|names| format!(" {}", names[0])).unwrap_or_default();
    format!("{short}`--{}{value}`", option.get_long().expect("a long name"))
}

fn effect(option: &Arg) -> String {
    let values = option.get_possible_values();
    let values = values.iter().map(|value| value.get_name());
    let defaults = option.get_default_values().iter().filter_map(|value| value.to_str());
    let mut text = option.get_help().expect("an option has a description").to_string();
    for (heading, words) in [("Values", codes(values)), ("Default", codes(defaults))] {
        if !words.is_empty() {
            text += &format!(". {heading}: {words}");
        }
    }
    text
}

fn exit_codes() -> impl Iterator<Item = [String; 2]> {
    EXIT_CODES.lines().skip(1).map(|line| {
        let (code, meaning) = line.trim().split_once("  ").expect("a code and its meaning");
        [code.to_owned(), meaning.to_owned()]
    })
}
