//! Row `chain`: intake as it is, against intake into a ledger whose trigger computes no hash chain.

use anyhow::Result;
use sqlx::Connection as _;

use crate::Suite;
use crate::intake::{Filled, registered_ledger, warm_up};
use crate::report::{Goal, Line, median};
use crate::servers::Database;

const ROUNDS: usize = 5;

/// The trigger of `migrations/0001_ledger.sql` that gives a batch its sequence, without a chain.
const SEQUENCE_ONLY: &str = "
    create or replace function take_sequence() returns trigger language plpgsql as $$
    declare
        taken bigint;
    begin
        update ledger set next_sequence = next_sequence + 1 returning next_sequence - 1 into taken;
        update batch set sequence = taken where id = new.id;
        return null;
    end
    $$";

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let (servers, events) = (&suite.servers, suite.size(200_000, 20_000));
    warm_up(servers).await?;
    let filled = Filled::new(servers, events).await?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for chain in if round % 2 == 0 { [true, false] } else { [false, true] } {
            let ledger = registered_ledger(servers).await?;
            if !chain {
                remove_chain(&ledger).await?;
            }
            let consumed =
                filled.consume(servers, &ledger, &format!("round-{round}-chain-{chain}"))?;
            let seconds = consumed.seconds - consumed.first_batch_seconds;
            if chain {
                with.push(seconds)
            } else {
                without.push(seconds)
            }
            servers.remove(&ledger).await?;
        }
    }
    let note = format!("after the first batch: with {with:.2?} s, without {without:.2?} s");
    let rate = |seconds: Vec<f64>| f64::from(events) / median(seconds);
    let limit = (rate(without), "intake without it");
    Ok(vec![
        Line::ratio("hash chain", rate(with), "events/s", limit, Goal::AtLeast(0.95)).with(note),
    ])
}

async fn remove_chain(ledger: &Database) -> Result<()> {
    let mut connection = ledger.connect().await?;
    sqlx::raw_sql(SEQUENCE_ONLY).execute(&mut connection).await?;
    Ok(connection.close().await?)
}
