//! `tallyline check`

use serde::Serialize;

use super::output::columns;
use super::{Context, Exit, Failure, PipelineArguments};
use crate::config::Mistakes;

/// List every mistake of a pipeline file.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Also look up every secret (env:, file:, exec:), without showing any
    #[arg(long)]
    secrets: bool,
}

#[derive(Serialize)]
struct Answer {
    mistakes: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    place: String,
    key: Option<String>,
    problem: String,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let mistakes = match arguments.pipeline.read() {
        Err(mistakes) => lines(&mistakes),
        Ok(pipeline) if arguments.secrets => {
            let mut lines = Vec::new();
            for (key, secret) in pipeline.secrets() {
                // an empty property is a value for librdkafka
                if secret.is_empty_literal() {
                    continue;
                }
                if let Err(error) = secret.resolve().await {
                    lines.push(Line { place: secret.origin(), key: Some(key), problem: error.to_string() });
                }
            }
            lines
        }
        Ok(_) => Vec::new(),
    };
    let exit = if mistakes.is_empty() { Exit::Success } else { Exit::Configuration };
    let answer = Answer { mistakes };
    context.output.answer(&answer, || table(&answer, &arguments.pipeline))?;
    Ok(exit)
}

fn lines(mistakes: &Mistakes) -> Vec<Line> {
    let line = |mistake: &crate::config::Mistake| Line {
        place: mistake.place.to_string(),
        key: mistake.key.clone(),
        problem: mistake.problem.clone(),
    };
    mistakes.iter().map(line).collect()
}

fn table(answer: &Answer, arguments: &PipelineArguments) -> String {
    if answer.mistakes.is_empty() {
        return format!("{}: no mistake\n", arguments.pipeline.display());
    }
    columns(
        ["PLACE", "KEY", "PROBLEM"],
        answer.mistakes.iter().map(|line| [line.place.clone(), line.key.clone().unwrap_or_default(), line.problem.clone()]),
    )
}
