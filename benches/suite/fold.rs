//! Row `fold`: the metrics fold from zero, against a bare binary read of the same rows.

use std::io::stdout;
use std::time::Instant;

use anyhow::{Result, ensure};
use futures::TryStreamExt as _;
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolCopyExt as _;
use tallyline::clock::Clock;
use tallyline::ledger::{Ledger, LedgerSettings};
use tallyline::projection::fold_to;
use tallyline::stages::MetricsState;

use crate::history::History;
use crate::process::{in_a_process_of_its_own, own_peak_kib};
use crate::report::{Goal, Line};
use crate::servers::Database;
use crate::{Suite, Task};

/// A fold from zero up to a sequence.
#[derive(Serialize, Deserialize)]
pub struct Folding {
    ledger: String,
    limit: i64,
}

#[derive(Serialize, Deserialize)]
struct Folded {
    seconds: f64,
    peak_kib: u64,
}

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let mut shared = suite.history.lock().await;
    let history = History::of(suite, &mut shared).await?;
    let events = suite.size(5_000_000, 10_000);
    history.extend(events).await?;
    let ledger = &history.ledger;
    let fold = async |events: i64| {
        let (limit, events) = batches_with(ledger, events).await?;
        let folding = Task::Fold(Folding { ledger: ledger.url.clone(), limit });
        anyhow::Ok((in_a_process_of_its_own::<Folded>(&folding)?, events, limit))
    };
    let (small, ..) = fold(events / 5).await?;
    let (folded, events, limit) = fold(events).await?;
    let (read_seconds, rows) = bare_read(ledger, limit).await?;
    ensure!(rows == events, "the fold has {events} events, and the read has {rows}");
    let rate = |seconds: f64| events as f64 / seconds;
    let read = (rate(read_seconds), "bare binary read");
    let (peak, mib) = (folded.peak_kib as f64 / 1024.0, small.peak_kib as f64 / 1024.0);
    let note = format!("{events} events: {:.1} s, bare read {read_seconds:.1} s", folded.seconds);
    let of_fewer = (mib, "with a fifth of the events");
    Ok(vec![
        Line::ratio("fold from zero", rate(folded.seconds), "events/s", read, Goal::AtLeast(0.7))
            .with(note),
        Line::ratio("fold, peak memory", peak, "MiB", of_fewer, Goal::AtMost(1.2)),
    ])
}

/// The first sequence with this number of events up to it, and that number.
async fn batches_with(ledger: &Database, events: i64) -> Result<(i64, i64)> {
    let query = "select sequence, events::bigint from (select sequence, sum(accepted) over (order by sequence) as events from batch) summed
         where events >= $1 order by sequence limit 1";
    Ok(sqlx::query_as(query).bind(events).fetch_one(&mut ledger.connect().await?).await?)
}

/// Seconds and rows of a read that drops its bytes.
async fn bare_read(ledger: &Database, limit: i64) -> Result<(f64, i64)> {
    let pool = ledger.open(1)?.pool;
    let begun = Instant::now();
    let mut rows = 0;
    for table in ["workspace_build", "prebuild_claim", "usage_event"] {
        let query = format!(
            "copy (select e.* from {table} e join batch on batch.id = e.batch_id where batch.sequence <= {limit}) to stdout (format binary)"
        );
        let mut pieces = pool.copy_out_raw(&query).await?;
        while pieces.try_next().await?.is_some() {
            rows += 1;
        }
        // the header is a part of the first row's piece, and the trailer is one of its own
        rows -= 1;
    }
    Ok((begun.elapsed().as_secs_f64(), rows))
}

/// Folds, then reports on standard output.
pub async fn fold(folding: &Folding) -> Result<()> {
    let settings = LedgerSettings { url: folding.ledger.clone(), connections: 2 };
    let ledger = Ledger::open(&settings, Clock::system())?;
    let begun = Instant::now();
    let folded = fold_to::<MetricsState>(&ledger, folding.limit).await?;
    ensure!(folded.sequence.number == folding.limit, "folded up to {}", folded.sequence);
    let seconds = begun.elapsed().as_secs_f64();
    serde_json::to_writer(stdout(), &Folded { seconds, peak_kib: own_peak_kib()? })?;
    Ok(())
}
