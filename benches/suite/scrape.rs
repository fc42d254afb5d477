//! Row `metrics`: one scrape of `/metrics` with 10,000 native histograms, without compression.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::ledger::sources;

use crate::Suite;
use crate::events::DEPLOYMENT;
use crate::process::{Pipeline, free_port};
use crate::report::{Goal, Line, median, quantile};
use crate::servers::Database;

/// Observations of each series.
const BUILDS_OF_A_SERIES: i64 = 5;
const SCRAPES: usize = 20;
/// The exposition format of native histograms.
const PROTOBUF: &str =
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
const FAMILY: &[u8] = b"coderd_workspace_creation_duration_seconds";
const DEADLINE: Duration = Duration::from_secs(60);

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let series = suite.size(10_000, 500);
    let ledger = suite.servers.ledger().await?;
    fill(&ledger, series).await?;
    let (api, metrics) = (free_port()?, free_port()?);
    let pipeline = Pipeline::migrated(&format!(
        "ledger.url = '{}'\nserve.api_listen = '127.0.0.1:{api}'\nserve.metrics_listen = '127.0.0.1:{metrics}'\n",
        ledger.url
    ))?;
    let mut serving = pipeline.start(&["serve"], &[])?;
    let (client, url) = (reqwest::Client::new(), format!("http://127.0.0.1:{metrics}/metrics"));
    let scrape = async || -> Result<(f64, Vec<u8>)> {
        let begun = Instant::now();
        let answer = client.get(&url).header("accept", PROTOBUF).send().await?;
        let body = answer.error_for_status()?.bytes().await?;
        Ok((begun.elapsed().as_secs_f64(), body.to_vec()))
    };
    let begun = Instant::now();
    while !matches!(scrape().await, Ok((_, page)) if contains(&page, FAMILY)) {
        if begun.elapsed() > DEADLINE {
            bail!("the series are not shown within {} s", DEADLINE.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (mut seconds, mut bytes) = (Vec::new(), 0);
    for _ in 0..SCRAPES {
        let (took, page) = scrape().await?;
        seconds.push(took);
        bytes = page.len();
    }
    serving.stop().await?;
    suite.servers.remove(&ledger).await?;
    let (middle, worst) = (median(seconds.clone()), quantile(seconds, 1.0));
    let note = format!("{series} series, {bytes} bytes, slowest {:.0} ms", worst * 1_000.0);
    let each = middle * 1e6 / series as f64;
    Ok(vec![
        Line::value("/metrics, one series", each, "µs", Goal::AtMost(10.0)).with(note),
        Line::value("/metrics, one scrape", middle * 1_000.0, "ms", Goal::AtMost(100.0)),
    ])
}

fn contains(page: &[u8], name: &[u8]) -> bool {
    page.windows(name.len()).any(|part| part == name)
}

/// Creations with a preset of its own for each series, of a source whose history is collected.
async fn fill(database: &Database, series: i64) -> Result<()> {
    let ledger = database.open(2)?;
    let (now, introduced) = (Clock::system().now(), Clock::system().now() - TimeDelta::days(30));
    ledger
        .run(async |conn| sources::register(conn, DEPLOYMENT, introduced, None, now).await)
        .await?;
    let mut connection = database.connect().await?;
    sqlx::query("update collector_progress set pass_id = 1, swept_pass_id = 1, complete_until = now(), started_at = now(), swept_at = now()")
        .execute(&mut connection)
        .await?;
    let builds = series * BUILDS_OF_A_SERIES;
    let batch: i64 = sqlx::query_scalar(
        "insert into batch (kind, recorded_at, topic, partition, generation, first_offset, next_offset, records, accepted)
         values ('log', now(), 'tallyline.workspace-builds.v1', 0, 1, 0, $1, $1, $1) returning id",
    )
    .bind(builds)
    .fetch_one(&mut connection)
    .await?;
    sqlx::query(
        "insert into workspace_build select source.id, md5('build' || n)::uuid, $2, n, sha256(n::text::bytea),
             md5('place' || n)::uuid, md5('organization')::uuid, md5('template')::uuid, md5('version')::uuid, md5('preset' || n % $3)::uuid,
             md5('owner')::uuid, md5('owner')::uuid, 'start', 'initiator', 'succeeded', 1, null, false, null, true, null, false, 10,
             now() - interval '1 hour' - (8 + n % 600) * interval '1 second', now() - interval '1 hour' - (7 + n % 600) * interval '1 second',
             now() - interval '1 hour', 'organization-' || n % $3 % 3, 'template-' || n % $3 % 100, 'release-1', 'preset-' || n % $3,
             'workspace-' || n, 'user-1', now()
         from source, generate_series(0, $1 - 1) n",
    )
    .bind(builds)
    .bind(batch)
    .bind(series)
    .execute(&mut connection)
    .await?;
    sqlx::query("insert into workspace_first_start select source_id, workspace_id, build_id from workspace_build")
        .execute(&mut connection)
        .await?;
    sqlx::raw_sql("vacuum analyze").execute(&mut connection).await?;
    Ok(())
}
