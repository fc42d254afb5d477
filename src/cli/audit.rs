//! `tallyline audit`

use std::time::Duration;

use super::roles::Site;
use super::{Context, Exit, Failure, Output, PipelineArguments, columns};
use crate::audit::{Audit, AuditReport};

/// Prove that the books balance, or list what differs.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Seconds to wait for a collector pass that began after a difference was seen
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    patience: u64,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let site = Site::open(arguments.pipeline.load()?, context.clock.clone()).await?;
    site.ledger.reach().await?;
    site.log.reach().await?;
    let report = audit(&site, Duration::from_secs(arguments.patience), context).await?;
    show(&report, context.output);
    Ok(if report.balanced { Exit::Success } else { Exit::Differs })
}

/// Audits a site that can be reached.
///
/// # Errors
/// A side that cannot be read: then nothing is said about the books.
pub async fn audit(site: &Site, patience: Duration, context: &Context) -> Result<AuditReport, Failure> {
    let source = match &site.coderd {
        Some(database) => site.deployment(&context.stop).await.map(|deployment| (database.clone(), deployment)),
        None => None,
    };
    let audit = Audit { ledger: site.ledger.ledger.clone(), log: site.log.log.clone(), source, patience };
    audit.run().await.map_err(Failure::from)
}

/// Prints what was found.
pub fn show(report: &AuditReport, output: Output) {
    match output {
        Output::Json => output.json(report),
        Output::Table => output.text(&table(report)),
    }
}

fn table(report: &AuditReport) -> String {
    let mut text = String::new();
    for joint in &report.joints {
        let verdict = if joint.differences.is_empty() { "balanced" } else { "DIFFERS" };
        text.push_str(&format!("{}: {verdict}\n", joint.name));
        text.push_str(&columns(joint.numbers.iter().map(|(name, number)| [format!("  {}", name.replace('_', " ")), number.to_string()])));
        for (mark, found) in [("differs", &joint.differences), ("remark", &joint.remarks)] {
            text.push_str(&columns(found.iter().map(|row| [format!("  {mark}"), row.kind.to_owned(), row.id.clone(), row.detail.clone()])));
        }
    }
    let end = if report.balanced { "the books balance" } else { "the books do NOT balance" };
    text.push_str(&format!("{end}, up to ledger sequence {}\n", report.sequence));
    text
}
