//! `tallyline audit`

use super::progress::Progress;
use super::via::{Via, ViaArguments};
use super::{Context, Exit, Failure, columns};
use crate::audit::AuditReport;
use crate::ledger::Difference;
use crate::operations::RunAudit;

/// Prove that the books balance, or list what differs.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    via: ViaArguments,
    /// Seconds to wait for a collector pass that began after a difference was seen
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    patience: u32,
    /// Also reread all records in the log, and list each ledger row that was changed, removed or added by hand
    #[arg(long)]
    deep: bool,
}

pub(super) async fn run(arguments: Arguments, context: &Context) -> Result<Exit, Failure> {
    let request = RunAudit { patience_seconds: Some(arguments.patience), deep: arguments.deep };
    let report = match arguments.via.open(context).await? {
        Via::Site(site) => {
            site.log.reach().await?;
            let progress = Progress::of_steps("records");
            let audited = site.desk()?.audit(&request, |done, total| progress.at("reading again", done, total)).await;
            progress.finish();
            audited?
        }
        Via::Api(api) => api.patient().post(&["audit"], &request, "").await?,
    };
    context.output.answer(&report, || table(&report))?;
    Ok(if report.balanced { Exit::Success } else { Exit::Differs })
}

/// The report for people.
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
