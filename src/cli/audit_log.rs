//! `tallyline audit-log`

use super::output::time;
use super::via::Query;
use super::{Context, Exit, Failure, columns};
use crate::operations::{Acts, ListActs};

pub(super) async fn run(query: Query<ListActs>, context: &Context) -> Result<Exit, Failure> {
    let answer = query.run(context).await?;
    context.output.answer(&answer, || table(&answer))?;
    Ok(Exit::Success)
}

fn table(answer: &Acts) -> String {
    let rows = answer.acts.iter().map(|act| {
        [
            act.id.to_string(),
            time(act.acted_at),
            act.actor.clone(),
            act.act.to_string(),
            act.subject.clone(),
            act.reason.clone(),
        ]
    });
    let page = columns(["ID", "AT", "WHO", "WHAT", "SUBJECT", "WHY"], rows);
    match answer.next_before {
        Some(before) => format!("{page}more with  --before {before}\n"),
        None if page.is_empty() => "no act\n".to_owned(),
        None => page,
    }
}
