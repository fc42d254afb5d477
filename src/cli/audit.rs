//! `tallyline audit`

use std::time::Duration;

use uuid::Uuid;

use super::progress::Progress;
use super::roles::Site;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, columns};
use crate::audit::{Audit, AuditReport, Joint};
use crate::coderd::Database;
use crate::ledger::{Difference, Ledger};
use crate::operations::RunAudit;

/// Prove that the books balance, or list what differs.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    via: ViaArguments,
    /// Seconds to wait for a collector pass that began after a difference was seen
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    patience: u32,
    /// Also read again what the log still holds, and name each row that was changed, removed or added by hand
    #[arg(long)]
    deep: bool,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let report = match arguments.via.open(context).await? {
        Via::Site(site) => here(&site, &arguments, context).await?,
        Via::Api(api) => {
            let request = RunAudit { patience_seconds: Some(arguments.patience), deep: arguments.deep };
            api.patient().post(&["audit"], &request, "").await?
        }
    };
    context.output.answer(&report, || table(&report))?;
    Ok(if report.balanced { Exit::Success } else { Exit::Differs })
}

async fn here(site: &Site, arguments: &Arguments, context: &Context) -> Result<AuditReport, Failure> {
    site.log.reach().await?;
    let report = audit(site, Duration::from_secs(arguments.patience.into()), context).await?;
    if arguments.deep { Ok(report.with(deep(site).await?)) } else { Ok(report) }
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
    let source = in_use(&site.ledger.ledger, source).await?;
    let audit = Audit { ledger: site.ledger.ledger.clone(), log: site.log.log.clone(), source, patience };
    audit.run().await.map_err(Failure::from)
}

/// The source, unless an operator has retired it: then it is not audited.
async fn in_use(ledger: &Ledger, source: Option<(Database, Uuid)>) -> Result<Option<(Database, Uuid)>, sqlx::Error> {
    match &source {
        Some((_, deployment)) if ledger.in_time(ledger.retirement(*deployment)).await?.is_some() => Ok(None),
        _ => Ok(source),
    }
}

/// Reads again what the log still holds, with a bar.
async fn deep(site: &Site) -> Result<Joint, Failure> {
    let audit = Audit { ledger: site.ledger.ledger.clone(), log: site.log.log.clone(), source: None, patience: Duration::ZERO };
    let ranges = audit.rereadable().await?;
    let offsets = ranges.iter().map(|range| u64::try_from(range.until - range.from).unwrap_or_default()).sum();
    let progress = Progress::new("reading again", offsets);
    let joint = audit.deep(&ranges, |offsets| progress.add(offsets)).await;
    progress.finish();
    Ok(joint?)
}

/// What was found, for reading.
#[must_use]
pub fn table(report: &AuditReport) -> String {
    let mut text = String::new();
    for joint in &report.joints {
        let verdict = if joint.differences.is_empty() { "balanced" } else { "DIFFERS" };
        let numbers = joint.numbers.iter().map(|(name, number)| [format!("  {}", name.replace('_', " ")), number.to_string()]);
        text += &columns([&joint.name.to_uppercase(), verdict], numbers);
        text += &columns(["  DIFFERENCE", "ID", "WHAT"], rows(&joint.differences));
        text += &columns(["  OPEN", "ID", "WHAT"], rows(&joint.open));
        text += &columns(["  REMARK", "ID", "WHAT"], rows(&joint.remarks));
        text.push('\n');
    }
    let end = if report.balanced { "the books balance" } else { "the books do NOT balance" };
    text + &format!("{end}, up to ledger sequence {}\n", report.sequence)
}

fn rows(found: &[Difference]) -> impl Iterator<Item = [String; 3]> {
    found.iter().map(|row| [format!("  {}", row.kind), row.id.clone(), row.detail.clone()])
}
