//! Row `coderd`: the time that coderd's database spends for Tallyline while 50 builds complete a
//! second, against coderd's own query once a minute.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use crate::Suite;
use crate::history::{AUDIT_ROLE, COLLECT_ROLE, History};
use crate::report::{Goal, Line, median};

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let mut shared = suite.history.lock().await;
    let history = History::of(suite, &mut shared).await?;
    let mut queries = Vec::new();
    for _ in 0..3 {
        queries.push(history.coderd.own_query_seconds().await? * 1_000.0);
    }
    let limit = (median(queries), "coderd's query, once a minute");
    let stop = CancellationToken::new();
    let traffic = history.coderd.traffic(history.next_build, &stop);
    let mut process = history.start(&["collect", "consume"])?;
    // the first passes find what the process does not know yet
    tokio::time::sleep(suite.size(Duration::from_secs(20), Duration::from_secs(3))).await;
    let window = suite.size(Duration::from_secs(60), Duration::from_secs(6));
    let poll = ms_a_minute(suite, history, window).await?;
    let window = suite.size(Duration::from_secs(180), Duration::from_secs(6));
    let audit = history.continuous_audit(Duration::from_secs(300), &stop)?;
    let all = ms_a_minute(suite, history, window).await?;
    stop.cancel();
    audit.await?;
    history.next_build = traffic.await??;
    process.stop().await?;
    let note = format!("{} jobs, 50 builds/s", history.jobs);
    let goals = [Goal::AtMost(1.0 / 50.0), Goal::AtMost(1.0 / 10.0)];
    Ok(vec![
        Line::ratio("coderd's database: poll", poll, "ms/min", limit, goals[0]).with(&note),
        Line::ratio("coderd's database: poll, sweep, audit", all, "ms/min", limit, goals[1])
            .with(note),
    ])
}

/// Milliseconds a minute that coderd's database spends on statements of Tallyline.
async fn ms_a_minute(suite: &Suite, history: &History, window: Duration) -> Result<f64> {
    let spent = async || {
        let mut sum = 0.0;
        for role in [COLLECT_ROLE, AUDIT_ROLE] {
            sum += suite.servers.statement_ms(role, Some(&history.coderd.database)).await?;
        }
        anyhow::Ok(sum)
    };
    let (begun, before) = (Instant::now(), spent().await?);
    tokio::time::sleep(window).await;
    Ok((spent().await? - before) / begun.elapsed().as_secs_f64() * 60.0)
}
