//! `tallyline check`

mod connections;

use serde::Serialize;

use super::output::columns;
use super::{Context, Exit, Failure, PipelineArguments};
use crate::config::{Mistakes, Pipeline};

/// List every mistake of a pipeline file.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Also look up every secret (env:, file:, exec:), without showing any
    #[arg(long)]
    secrets: bool,
    /// Also try every connection and every right, and list all that is missing with the statement that gives it
    #[arg(long)]
    connect: bool,
}

#[derive(Serialize)]
struct Answer {
    mistakes: Vec<Line>,
    /// What works, but with less than it should.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Serialize)]
pub(super) struct Line {
    place: String,
    key: Option<String>,
    problem: String,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let (mut mistakes, mut warnings) = (Vec::new(), Vec::new());
    match arguments.pipeline.read() {
        Err(wrong) => mistakes = lines(&wrong),
        Ok(pipeline) => {
            if arguments.secrets {
                mistakes = missing_secrets(&pipeline).await;
            }
            if arguments.connect {
                let found = connections::check(pipeline, context.clock.clone()).await;
                mistakes.extend(found.mistakes);
                warnings = found.warnings;
            }
        }
    }
    let exit = if mistakes.is_empty() { Exit::Success } else { Exit::Configuration };
    let answer = Answer { mistakes, warnings };
    context.output.answer(&answer, || table(&answer, &arguments.pipeline))?;
    Ok(exit)
}

async fn missing_secrets(pipeline: &Pipeline) -> Vec<Line> {
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

fn lines(mistakes: &Mistakes) -> Vec<Line> {
    let line = |mistake: &crate::config::Mistake| Line {
        place: mistake.place.to_string(),
        key: mistake.key.clone(),
        problem: mistake.problem.clone(),
    };
    mistakes.iter().map(line).collect()
}

fn table(answer: &Answer, arguments: &PipelineArguments) -> String {
    let mut text: String = answer.warnings.iter().map(|warning| format!("warning: {warning}\n")).collect();
    if answer.mistakes.is_empty() {
        text.push_str(&format!("{}: no mistake\n", arguments.pipeline.display()));
        return text;
    }
    text.push_str(&columns(
        ["PLACE", "KEY", "PROBLEM"],
        answer.mistakes.iter().map(|line| [line.place.clone(), line.key.clone().unwrap_or_default(), line.problem.clone()]),
    ));
    text
}
