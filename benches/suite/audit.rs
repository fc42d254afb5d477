//! Row `audit`: the time that both databases spend on one interval of the continuous audit, beside
//! one million and ten million events.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio_util::sync::CancellationToken;

use crate::Suite;
use crate::history::{AUDIT_ROLE, History};
use crate::report::{Goal, Line};

/// Intervals in one measurement.
const INTERVALS: u32 = 3;

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let mut shared = suite.history.lock().await;
    let history = History::of(suite, &mut shared).await?;
    let few = cost_of_an_interval(suite, history).await?;
    history.extend(history.jobs * 10).await?;
    let many = cost_of_an_interval(suite, history).await?;
    let differences = "select coalesce(sum(differences), 0)::bigint from audit_finding";
    let differences: i64 =
        sqlx::query_scalar(differences).fetch_one(&mut history.ledger.connect().await?).await?;
    let note = format!("time of the audit's statements; {differences} differences");
    let limit = (few, "with a tenth of the events");
    Ok(vec![Line::ratio("audit, one interval", many, "ms", limit, Goal::AtMost(1.2)).with(note)])
}

/// Milliseconds of statements of one interval, after the first audit. An error: fewer than two
/// audits have ended in time.
async fn cost_of_an_interval(suite: &Suite, history: &mut History) -> Result<f64> {
    let every = suite.size(Duration::from_secs(10), Duration::from_secs(1));
    let deadline = suite.size(Duration::from_secs(90), Duration::from_secs(60));
    let stop = CancellationToken::new();
    let stop_at_the_end = stop.clone().drop_guard();
    let traffic = history.coderd.traffic(history.next_build, &stop);
    let mut process = history.start(&["collect", "consume"])?;
    let spent = async || suite.servers.statement_ms(AUDIT_ROLE, None).await;
    let begun = Instant::now();
    let mut last = audited_at(history).await?;
    let audit = history.continuous_audit(every, &stop)?;
    let (mut audits, mut after_first, mut cost) = (0, 0.0, 0.0);
    while audits <= INTERVALS && begun.elapsed() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = audited_at(history).await?;
        if now <= last {
            continue;
        }
        let spent = spent().await?;
        if audits == 0 {
            after_first = spent;
        } else {
            cost = (spent - after_first) / f64::from(audits);
        }
        (last, audits) = (now, audits + 1);
    }
    drop(stop_at_the_end);
    audit.await?;
    history.next_build = traffic.await??;
    process.stop().await?;
    ensure!(audits >= 2, "{audits} audits within {} s; expected at least 2", deadline.as_secs());
    Ok(cost)
}

/// When the joint of source and ledger was last audited, in seconds since 1970; 0: never.
async fn audited_at(history: &History) -> Result<f64> {
    let query = "select coalesce(max(extract(epoch from audited_at)), 0)::float8 from audit_finding where joint = 'source and ledger'";
    Ok(sqlx::query_scalar(query).fetch_one(&mut history.ledger.connect().await?).await?)
}
