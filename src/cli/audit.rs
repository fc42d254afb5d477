//! `tallyline audit`

use super::via::Query;
use super::{Context, Exit, Failure, columns};
use crate::audit::AuditReport;
use crate::ledger::Difference;
use crate::operations::RunAudit;

pub(super) async fn run(query: Query<RunAudit>, context: &Context) -> Result<Exit, Failure> {
    let report = query.run(context).await?;
    context.output.answer(&report, || table(&report))?;
    Ok(if report.balanced { Exit::Success } else { Exit::Differs })
}

/// The report for people.
#[must_use]
pub fn table(report: &AuditReport) -> String {
    let mut text = String::new();
    for joint in &report.joints {
        let result = if joint.differences.is_empty() { "balanced" } else { "DIFFERS" };
        let numbers = joint
            .numbers
            .iter()
            .map(|(name, number)| [format!("  {}", name.replace('_', " ")), number.to_string()]);
        text += &columns([&joint.name.to_uppercase(), result], numbers);
        text += &columns(["  DIFFERENCE", "ID", "WHAT"], rows(&joint.differences));
        text += &columns(["  OPEN", "ID", "WHAT"], rows(&joint.open));
        text += &columns(["  REMARK", "ID", "WHAT"], rows(&joint.remarks));
        text.push('\n');
    }
    let end = if report.balanced { "the books balance" } else { "the books do NOT balance" };
    text + &format!("head {}\n{end}, up to ledger sequence {}\n", report.head, report.sequence)
}

fn rows(found: &[Difference]) -> impl Iterator<Item = [String; 3]> {
    found.iter().map(|row| [format!("  {}", row.kind), row.id.clone(), row.detail.clone()])
}
