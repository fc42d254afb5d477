//! The entitlements' latency at a constant rate, beside a producer that appends 5,000 events a
//! second to Kafka, a process that consumes them, and the folds of the serving process.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::Suite;
use crate::http::latencies;
use crate::live::{Serving, Site, Source};
use crate::process::answers;
use crate::report::{Goal, Line, quantile};

/// Each tick appends this number of events.
const TICK: Duration = Duration::from_millis(20);
const EVENTS_OF_A_TICK: u32 = 100;
/// The first events also start what starts with the first event.
const WARM_UP: Duration = Duration::from_secs(3);
const DEADLINE: Duration = Duration::from_secs(60);
const PATH: &str = "/api/v2/entitlements";

/// The p99 at this number of requests a second. An error: the events are not all counted soon
/// after, so the intake was not beside the requests.
pub async fn measure(suite: &Suite, rate: f64) -> Result<Line> {
    let site = Site::new(suite).await?;
    let source = site.source().await?;
    let (mut consuming, mut serving) = (site.start("consume")?, site.serve()?);
    let before = serving.shows(DEADLINE).await?;
    answers(&format!("http://{}{PATH}", serving.api), DEADLINE).await?;
    let length = suite.size(Duration::from_secs(15), Duration::from_secs(2));
    let appending = tokio::spawn(append(source, WARM_UP + length));
    tokio::time::sleep(WARM_UP).await;
    let api = serving.api;
    let asked = tokio::task::spawn_blocking(move || latencies(api, PATH, rate, length)).await??;
    let (events, seconds) = appending.await??;
    let behind = counted(&serving, before + u64::from(events)).await?;
    for process in [&mut consuming, &mut serving.process] {
        process.stop().await?;
    }
    suite.servers.remove(&site.ledger).await?;
    suite.servers.remove(&site.coderd.database).await?;
    let note = format!(
        "{} requests at {rate:.0}/s, p50 {:.2} ms; {:.0} events/s appended, all counted {behind:.1} s later",
        asked.len(),
        quantile(asked.clone(), 0.5),
        f64::from(events) / seconds,
    );
    let row = "entitlements beside 5,000 events/s, p99";
    Ok(Line::value(row, quantile(asked, 0.99), "ms", Goal::AtMost(1.0)).with(note))
}

/// Appends at a constant rate, however long an acknowledgement takes. Returns the number of events
/// and the seconds until the last acknowledgement.
async fn append(source: Source, length: Duration) -> Result<(u32, f64)> {
    let (begun, mut appends, mut events) = (Instant::now(), Vec::new(), 0);
    while TICK * (events / EVENTS_OF_A_TICK) < length {
        let due = begun + TICK * (events / EVENTS_OF_A_TICK);
        tokio::time::sleep(due.saturating_duration_since(Instant::now())).await;
        let (source, numbers) = (source.clone(), events..events + EVENTS_OF_A_TICK);
        appends.push(tokio::spawn(async move { source.append_creations(numbers).await }));
        events += EVENTS_OF_A_TICK;
    }
    for append in appends {
        append.await??;
    }
    Ok((events, begun.elapsed().as_secs_f64()))
}

/// Waits until the series count this number of creations. Returns the seconds that it took.
async fn counted(serving: &Serving, creations: u64) -> Result<f64> {
    let begun = Instant::now();
    loop {
        let shown = serving.creations().await.unwrap_or_default();
        if shown >= creations {
            return Ok(begun.elapsed().as_secs_f64());
        }
        ensure!(begun.elapsed() < DEADLINE, "{shown} of {creations} creations are counted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
