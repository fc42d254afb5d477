//! `tallyline check`

mod connections;
mod line;

use serde::Serialize;

use line::Line;

use super::output::columns;
use super::{Context, Exit, Failure, PipelineArguments};
use crate::config::{Mistakes, Pipeline};
use crate::event::MIN_KEY_BYTES;

/// List every mistake of a pipeline file.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Also resolve every secret (env:, file:, exec:), without showing any
    #[arg(long)]
    secrets: bool,
    /// Also test the databases and Kafka without writing, and list each missing right, in a database
    /// with its grant statement; does not test Tallyman
    #[arg(long)]
    connect: bool,
}

#[derive(Serialize)]
struct Answer {
    mistakes: Vec<Line>,
    /// Settings that work, but less well than they could.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Without keys, everyone who may write to a topic can add events.
const UNVERIFIED: &str = "log.verification_keys is not set: records are not verified, and anyone who may write to the topics can add numbers";

const NO_LICENSE_KEYS: &str = "license.public_keys is not set: every license is refused, so that nothing is entitled and mode sole publishes nothing";

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let (mut mistakes, mut warnings, mut server_is_away) = (Vec::new(), Vec::new(), false);
    match arguments.pipeline.read() {
        Err(wrong) => mistakes = lines(&wrong),
        Ok(pipeline) => {
            let mut unverified = pipeline.log.verification_keys.is_empty();
            if pipeline.license.public_keys.is_empty() {
                warnings.push(NO_LICENSE_KEYS.to_owned());
            }
            if arguments.secrets {
                mistakes = wrong_secrets(&pipeline).await;
            }
            if arguments.connect {
                let found = connections::check(pipeline, context.clock.clone()).await;
                server_is_away = mistakes.is_empty() && found.is_unreachable();
                unverified &= !found.signed;
                mistakes.extend(found.mistakes);
                warnings.extend(found.warnings);
            }
            if unverified {
                warnings.push(UNVERIFIED.to_owned());
            }
        }
    }
    let exit = match mistakes.is_empty() {
        true => Exit::Success,
        false if server_is_away => Exit::Unreachable,
        false => Exit::Configuration,
    };
    let answer = Answer { mistakes, warnings };
    context.output.answer(&answer, || table(&answer, &arguments.pipeline))?;
    Ok(exit)
}

/// Secrets that cannot be resolved, and signature keys that are too short.
async fn wrong_secrets(pipeline: &Pipeline) -> Vec<Line> {
    let mut lines = Vec::new();
    for (key, secret) in pipeline.secrets() {
        // librdkafka accepts an empty property
        if secret.is_empty_literal() {
            continue;
        }
        let problem = match secret.resolve().await {
            Err(error) => error.to_string(),
            Ok(text) if key.starts_with("log.verification_keys.") && text.len() < MIN_KEY_BYTES => {
                format!("has {} bytes; at least {MIN_KEY_BYTES} are needed", text.len())
            }
            Ok(_) => continue,
        };
        lines.push(Line { place: secret.origin(), key: Some(key), problem });
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
    let mut text: String =
        answer.warnings.iter().map(|warning| format!("warning: {warning}\n")).collect();
    if answer.mistakes.is_empty() {
        text.push_str(&format!("{}: no mistake\n", arguments.pipeline.display()));
        return text;
    }
    text.push_str(&columns(
        ["PLACE", "KEY", "PROBLEM"],
        answer.mistakes.iter().map(|line| {
            [line.place.clone(), line.key.clone().unwrap_or_default(), line.problem.clone()]
        }),
    ));
    text
}
