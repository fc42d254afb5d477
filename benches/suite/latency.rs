//! Row `latency`: from a record's acknowledgement by Kafka to its count on `/metrics`, and from a
//! usage record to the vendor's acceptance, at 1,000 events a second.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use uuid::Uuid;

use crate::Suite;
use crate::live::{Serving, Site, Source};
use crate::report::{Goal, Line, quantile};

/// Each tick appends this number of events.
const TICK: Duration = Duration::from_millis(20);
const EVENTS_OF_A_TICK: u32 = 20;
/// Each of these ticks also appends one usage event.
const USAGE_TICKS: u32 = 5;
/// The first events also start what starts with the first event.
const WARM_UP: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(120);

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let site = Site::new(suite).await?;
    let source = site.source().await?;
    let (mut consuming, mut serving) = (site.start("consume")?, site.serve()?);
    let mut publishing = site.start("publish")?;
    let before = serving.shows(DEADLINE).await?;
    let length = WARM_UP + suite.size(Duration::from_secs(30), Duration::from_secs(5));
    let (appended, counted) =
        tokio::join!(append(&source, length), watch(&serving, before, length));
    let (appended, counted) = (appended?, counted?);
    let accepted = accepted(&site, &appended.usage).await?;
    for process in [&mut consuming, &mut serving.process, &mut publishing] {
        process.stop().await?;
    }
    suite.servers.remove(&site.ledger).await?;
    suite.servers.remove(&site.coderd.database).await?;
    let latencies = latencies(&appended.creations, &counted)?;
    let note =
        format!("{} events, p50 {:.0} ms", latencies.len(), quantile(latencies.clone(), 0.5));
    let usage = format!("{} events, p50 {:.0} ms", accepted.len(), quantile(accepted.clone(), 0.5));
    let p99 = |values| quantile(values, 0.99);
    Ok(vec![
        Line::value("event to count, p99", p99(latencies), "ms", Goal::AtMost(250.0)).with(note),
        Line::value("usage to acceptance, p99", p99(accepted), "ms", Goal::AtMost(2_000.0))
            .with(usage),
    ])
}

struct Appended {
    /// When each creation was acknowledged.
    creations: Vec<Instant>,
    /// When each usage event was acknowledged, by its id.
    usage: HashMap<String, DateTime<Utc>>,
}

/// Appends at a constant rate, whatever the consumer does.
async fn append(source: &Source, length: Duration) -> Result<Appended> {
    let begun = Instant::now();
    let (mut creations, mut usage) = (Vec::new(), Vec::new());
    for tick in 0.. {
        let due = begun + TICK * tick;
        if due > begun + length {
            break;
        }
        tokio::time::sleep(due.saturating_duration_since(Instant::now())).await;
        let numbers = tick * EVENTS_OF_A_TICK..(tick + 1) * EVENTS_OF_A_TICK;
        let to = source.clone();
        creations.push(tokio::spawn(async move {
            to.append_creations(numbers).await.map(|_| Instant::now())
        }));
        if tick % USAGE_TICKS == 0 {
            let (to, is_measured) = (source.clone(), due > begun + WARM_UP);
            usage.push(tokio::spawn(async move {
                let id = Uuid::new_v4().to_string();
                to.append_usage(&id)
                    .await
                    .map(|_| is_measured.then_some((id, Clock::system().now())))
            }));
        }
    }
    let mut appended = Appended { creations: Vec::new(), usage: HashMap::new() };
    for tick in creations {
        appended.creations.extend([tick.await??].repeat(EVENTS_OF_A_TICK as usize));
    }
    appended.creations.sort();
    for event in usage {
        appended.usage.extend(event.await??);
    }
    Ok(appended)
}

/// Each count that the page shows, and when the answer arrived.
async fn watch(serving: &Serving, before: u64, length: Duration) -> Result<Vec<(Instant, u64)>> {
    let begun = Instant::now();
    let ticks = length.as_millis() / TICK.as_millis() + 1;
    let all = u64::try_from(ticks)? * u64::from(EVENTS_OF_A_TICK);
    let mut seen = Vec::new();
    loop {
        if let Some(creations) = serving.creations().await {
            let counted = creations.saturating_sub(before);
            seen.push((Instant::now(), counted));
            if counted >= all {
                return Ok(seen);
            }
        }
        if begun.elapsed() > length + DEADLINE {
            bail!("not all of {all} events are counted: {:?}", seen.last());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Milliseconds from the n-th acknowledgement to the first page that counts n events.
fn latencies(appended: &[Instant], counted: &[(Instant, u64)]) -> Result<Vec<f64>> {
    let Some(first) = appended.first() else { bail!("no event was appended") };
    let (mut pages, mut milliseconds) = (counted.iter().peekable(), Vec::new());
    for (number, at) in (1..).zip(appended) {
        while pages.next_if(|(_, counted)| *counted < number).is_some() {}
        let Some((seen, _)) = pages.peek() else { bail!("event {number} is not counted") };
        if *at > *first + WARM_UP {
            milliseconds.push(seen.saturating_duration_since(*at).as_secs_f64() * 1_000.0);
        }
    }
    Ok(milliseconds)
}

/// Milliseconds from the acknowledgement of each usage event to its acceptance.
async fn accepted(site: &Site, usage: &HashMap<String, DateTime<Utc>>) -> Result<Vec<f64>> {
    let begun = Instant::now();
    loop {
        let billed = site.vendor.books().billed;
        let times: Vec<TimeDelta> = billed
            .iter()
            .filter_map(|billed| Some(*billed.billed_at.first()? - *usage.get(&billed.id)?))
            .collect();
        if times.len() == usage.len() {
            return Ok(times.iter().map(|time| time.as_seconds_f64() * 1_000.0).collect());
        }
        ensure!(
            begun.elapsed() < DEADLINE,
            "{} of {} usage events are accepted",
            times.len(),
            usage.len()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
