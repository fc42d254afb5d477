//! Row `coderd`: the time that coderd's database spends for Tallyline while 50 builds complete a
//! second, against coderd's own query once a minute.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use crate::Suite;
use crate::history::{AUDIT_ROLE, COLLECT_ROLE, History};
use crate::report::{Goal, Line, median};

const AUDITED: &str = "select exists (select from audit_finding where joint = 'source and ledger')";

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let mut shared = suite.history.lock().await;
    let history = History::of(suite, &mut shared).await?;
    let mut queries = Vec::new();
    for _ in 0..3 {
        queries.push(history.coderd.own_query_seconds().await? * 1_000.0);
    }
    let limit = (median(queries), "coderd's query, once a minute");
    let stop = CancellationToken::new();
    let stop_at_the_end = stop.clone().drop_guard();
    // its first audit is over when the other process begins, which then does not audit
    let audit = history.continuous_audit(Duration::from_secs(300), &stop)?;
    history.ledger.wait("the source is audited", Duration::from_secs(120), AUDITED).await?;
    let traffic = history.coderd.traffic(history.next_build, &stop);
    let mut process = history.start(&["collect", "consume"])?;
    // the first passes find what the process does not know yet
    tokio::time::sleep(suite.size(Duration::from_secs(20), Duration::from_secs(3))).await;
    let window = suite.size(Duration::from_secs(600), Duration::from_secs(6));
    let [poll, audited] = ms_a_minute(suite, history, window).await?;
    drop(stop_at_the_end);
    audit.await?;
    history.next_build = traffic.await??;
    process.stop().await?;
    let (note, all) = (format!("{} jobs, 50 builds/s", history.jobs), poll + audited);
    let goals = [Goal::AtMost(1.0 / 50.0), Goal::AtMost(1.0 / 10.0)];
    Ok(vec![
        Line::ratio("coderd's database: poll", poll, "ms/min", limit, goals[0]).with(&note),
        Line::ratio("coderd's database: poll, slices and audit", all, "ms/min", limit, goals[1])
            .with(note),
    ])
}

/// Milliseconds a minute that coderd's database spends on statements of the collector and of the
/// audit.
async fn ms_a_minute(suite: &Suite, history: &History, window: Duration) -> Result<[f64; 2]> {
    let spent = async |role| suite.servers.statement_ms(role, Some(&history.coderd.database)).await;
    let (begun, poll, audit) =
        (Instant::now(), spent(COLLECT_ROLE).await?, spent(AUDIT_ROLE).await?);
    tokio::time::sleep(window).await;
    let spent = [spent(COLLECT_ROLE).await? - poll, spent(AUDIT_ROLE).await? - audit];
    Ok(spent.map(|ms| ms / begun.elapsed().as_secs_f64() * 60.0))
}
