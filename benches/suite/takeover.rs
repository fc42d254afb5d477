//! Row `takeover`: `kill -9` of a consumer until its partitions are consumed again, and of a
//! serving process until another shows the series, with the shipped settings.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tallyline::event::Topic;
use uuid::Uuid;

use crate::Suite;
use crate::live::{Serving, Site};
use crate::process::Process;
use crate::report::{Goal, Line, quantile};

const DEADLINE: Duration = Duration::from_secs(120);
/// Creations and usage events that reach all partitions of their topics.
const EVENTS: u32 = 200;
const USAGE: u32 = 40;

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let rounds = suite.size(3, 1);
    let site = Site::new(suite).await?;
    let consumers = consumers(&site, rounds).await?;
    let serving = serving(&site, rounds).await?;
    suite.servers.remove(&site.ledger).await?;
    suite.servers.remove(&site.coderd.database).await?;
    let line = |row: &str, seconds: Vec<f64>, goal| {
        let note = format!("each kill: {seconds:.2?} s");
        Line::value(row, quantile(seconds, 1.0), "s", Goal::AtMost(goal)).with(note)
    };
    Ok(vec![
        line("kill -9 of a consumer, longest", consumers, 5.0),
        line("kill -9 of a serving process, longest", serving, 10.0),
    ])
}

/// The last offset of records, by topic and partition.
type Ends = BTreeMap<(String, i32), i64>;

/// Seconds from each kill until records of builds and usage in every partition, appended after the
/// kill, are consumed. Each member has some of these partitions.
async fn consumers(site: &Site, rounds: u32) -> Result<Vec<f64>> {
    let mut remaining = site.start("consume")?;
    let (source, mut next) = (site.source().await?, 0..EVENTS);
    let mut append = async || {
        let mut ends = Ends::new();
        let builds = source.append_creations(next.clone()).await?;
        next = next.end..next.end + EVENTS;
        ends.extend(at(Topic::WorkspaceBuilds, builds));
        for _ in 0..USAGE {
            let usage = source.append_usage(&Uuid::new_v4().to_string()).await?;
            ends.extend(at(Topic::AgentUsage, usage));
        }
        anyhow::Ok(ends)
    };
    consumed(site, &append().await?).await?;
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        let epochs = epochs(site).await?;
        let (mut killed, begun) = (remaining, Instant::now());
        remaining = site.start("consume")?;
        // the new member has partitions: their epochs have risen
        while self::epochs(site).await? <= epochs {
            ensure!(begun.elapsed() < DEADLINE, "the new consumer got no partition");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        consumed(site, &append().await?).await?;
        let begun = Instant::now();
        killed.kill()?;
        consumed(site, &append().await?).await?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    remaining.stop().await?;
    Ok(seconds)
}

fn at(topic: Topic, places: Vec<(i32, i64)>) -> impl Iterator<Item = ((String, i32), i64)> {
    places
        .into_iter()
        .map(move |(partition, offset)| ((topic.name().to_owned(), partition), offset))
}

async fn epochs(site: &Site) -> Result<i64> {
    let query = "select coalesce(sum(epoch), 0)::bigint from position";
    Ok(sqlx::query_scalar(query).fetch_one(&mut site.ledger.connect().await?).await?)
}

/// Waits until each partition is consumed up to these offsets.
async fn consumed(site: &Site, ends: &Ends) -> Result<()> {
    let (begun, mut connection) = (Instant::now(), site.ledger.connect().await?);
    loop {
        let positions: Vec<(String, i32, i64)> =
            sqlx::query_as("select topic, partition, next_offset from position")
                .fetch_all(&mut connection)
                .await?;
        let positions: Ends =
            positions.into_iter().map(|(topic, at, next)| ((topic, at), next)).collect();
        if ends.iter().all(|(partition, last)| positions.get(partition) > Some(last)) {
            return Ok(());
        }
        ensure!(begun.elapsed() < DEADLINE, "positions {positions:?}, records up to {ends:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Seconds from each kill of the process that shows the series until another shows them.
async fn serving(site: &Site, rounds: u32) -> Result<Vec<f64>> {
    let mut shows: Serving = site.serve()?;
    shows.shows(DEADLINE).await?;
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        let waiting = site.serve()?;
        crate::process::answers(&format!("http://{}/readyz", waiting.metrics), DEADLINE).await?;
        let begun = Instant::now();
        shows.process.kill()?;
        waiting.shows(DEADLINE).await?;
        seconds.push(begun.elapsed().as_secs_f64());
        shows = waiting;
    }
    stop(shows.process).await?;
    Ok(seconds)
}

async fn stop(mut process: Process) -> Result<()> {
    process.stop().await
}
