//! Row `replay`: the same events again, all of them duplicates, against the same events new.

use anyhow::Result;

use crate::Suite;
use crate::intake::{Filled, registered_ledger, warm_up};
use crate::report::{Goal, Line, median};

const ROUNDS: usize = 3;

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let (servers, events) = (&suite.servers, suite.size(200_000, 20_000));
    warm_up(servers).await?;
    let (mut new, mut again) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let (filled, ledger) =
            (Filled::new(servers, events).await?, registered_ledger(servers).await?);
        // without the group's formation, which is the same in both
        let seconds = || {
            let consumed = filled.consume(servers, &ledger, &format!("round-{round}"))?;
            anyhow::Ok(consumed.seconds - consumed.first_batch_seconds)
        };
        new.push(seconds()?);
        filled.append(servers).await?;
        servers.checkpoint().await?;
        again.push(seconds()?);
        servers.remove(&ledger).await?;
    }
    let note = format!("after the first batch: new {new:.2?} s, again {again:.2?} s");
    let rate = |seconds: Vec<f64>| f64::from(events) / median(seconds);
    let limit = (rate(new), "the same events new");
    Ok(vec![
        Line::ratio("replay, 100 % duplicates", rate(again), "events/s", limit, Goal::AtLeast(1.5))
            .with(note),
    ])
}
