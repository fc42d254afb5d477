//! Row `export`: usage as CSV, against `COPY (query) TO` of the same rows.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::TryStreamExt as _;
use sqlx::postgres::PgPoolCopyExt as _;
use tallyline::clock::Clock;
use tallyline::ledger::sources;
use uuid::Uuid;

use crate::Suite;
use crate::process::{Pipeline, Process};
use crate::report::{Goal, Line, median};
use crate::servers::Database;

/// Events of one batch, and of one request to the vendor.
const BATCH: i64 = 5_000;
const REQUEST: i64 = 100;
const ROUNDS: usize = 3;

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let events = suite.size(2_000_000, 20_000);
    let ledger = suite.servers.ledger().await?;
    fill(&ledger, events).await?;
    let pipeline = Pipeline::new(&format!("roles = ['serve']\nledger.url = '{}'\n", ledger.url))?;
    let (mut exports, mut copies, mut peak) = (Vec::new(), Vec::new(), 0);
    for round in 0..ROUNDS {
        for export in if round % 2 == 0 { [true, false] } else { [false, true] } {
            suite.servers.checkpoint().await?;
            if export {
                let (seconds, kib, rows) = self::export(&pipeline).await?;
                ensure!(rows == events, "the export has {rows} of {events} rows");
                exports.push(seconds);
                peak = peak.max(kib);
            } else {
                let (seconds, rows) = copy(&ledger, &pipeline).await?;
                ensure!(rows == events, "COPY has {rows} of {events} rows");
                copies.push(seconds);
            }
        }
    }
    suite.servers.remove(&ledger).await?;
    let (export, copy) = (median(exports.clone()), median(copies.clone()));
    let rate = |seconds: f64| events as f64 / seconds;
    let note = format!("export {exports:.2?} s, COPY {copies:.2?} s");
    let limit = (rate(copy), "COPY (query) TO");
    Ok(vec![
        Line::ratio("export, CSV", rate(export), "rows/s", limit, Goal::AtLeast(0.5)).with(note),
        Line::value("export, peak memory", peak as f64 / 1024.0, "MiB", Goal::AtMost(256.0)),
    ])
}

/// One run of the command: seconds, the peak of its memory in KiB, and rows.
async fn export(pipeline: &Pipeline) -> Result<(f64, u64, i64)> {
    let file = pipeline.path("usage.csv");
    let begun = Instant::now();
    let mut process = Process::spawn({
        let mut command = pipeline.command(&[
            "export",
            "usage",
            "--from",
            "2026-01-01",
            "--to",
            "2026-12-01",
            "--allow-incomplete",
        ]);
        command.arg("--file").arg(&file);
        command
    })?;
    let mut peak = 0;
    let status = loop {
        peak = process.peak_kib().unwrap_or(0).max(peak);
        if let Some(status) = process.ended()? {
            break status;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let seconds = begun.elapsed().as_secs_f64();
    ensure!(status.success(), "tallyline export: {status}");
    let lines = bytecount(&std::fs::read(&file)?);
    Ok((seconds, peak, lines - 1))
}

/// The same rows and columns by `COPY`, into a file. Each event has one settlement and one accepted
/// attempt, so that the query needs neither an order of settlements nor one of attempts.
async fn copy(ledger: &Database, pipeline: &Pipeline) -> Result<(f64, i64)> {
    let pool = ledger.open(1)?.pool;
    let mut file = std::io::BufWriter::new(std::fs::File::create(pipeline.path("copy.csv"))?);
    let begun = Instant::now();
    let mut rows = pool
        .copy_out_raw(
            "copy (
                 select source.deployment_id, usage.id, usage.event_type, usage.quantity,
                     case usage.event_type when 'dc_managed_agents_v1' then 'agents' else 'ms' end as unit, usage.created_at,
                     publication.state, attempt.request_id, ledger.incarnation || ':' || batch.sequence
                 from ledger, source join usage_event usage on usage.source_id = source.id join batch on batch.id = usage.batch_id
                 join publication on publication.source_id = usage.source_id and publication.event_id = usage.id
                 left join publication_attempt attempt
                     on attempt.source_id = usage.source_id and attempt.event_id = usage.id and attempt.verdict = 'accepted'
                 where usage.created_at >= '2026-01-01' and usage.created_at < '2026-12-01'
                 order by usage.created_at, usage.id collate \"C\", source.deployment_id
             ) to stdout (format csv)",
        )
        .await?;
    let mut lines = 0;
    while let Some(piece) = rows.try_next().await? {
        lines += bytecount(&piece);
        file.write_all(&piece)?;
    }
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok((begun.elapsed().as_secs_f64(), lines))
}

fn bytecount(text: &[u8]) -> i64 {
    text.iter().filter(|byte| **byte == b'\n').count() as i64
}

/// Usage that the vendor has accepted, in requests of 100 events.
async fn fill(database: &Database, events: i64) -> Result<()> {
    let ledger = database.open(2)?;
    let now = Clock::system().now();
    ledger
        .run(async |conn| sources::register(conn, Uuid::from_u128(0xb), now, None, now).await)
        .await?;
    let mut connection = database.connect().await?;
    let offset: i64 =
        sqlx::query_scalar("select max(id) + 1 from batch").fetch_one(&mut connection).await?;
    // the batches of events, then one of verdicts for each request
    sqlx::query(
        "insert into batch (kind, recorded_at, topic, partition, generation, first_offset, next_offset, records, accepted)
         select 'log', now(), 'tallyline.agent-usage.v1', 0, 1, n, n + $2, $2, $2 from generate_series(0, $1 - 1, $2) n order by n",
    )
    .bind(events)
    .bind(BATCH)
    .execute(&mut connection)
    .await?;
    sqlx::query("insert into batch (kind, recorded_at) select 'verdicts', now() from generate_series(1, $1 / $2)")
        .bind(events)
        .bind(REQUEST)
        .execute(&mut connection)
        .await?;
    // foreign keys are not checked: the rows are right
    sqlx::query("set session_replication_role = replica").execute(&mut connection).await?;
    let request = "md5('request' || (n - 1) / $4)::uuid";
    for statement in [
        "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at, confirmed_at)
         select 1, md5('usage' || n)::uuid::text, $3 + (n - 1) / $2, n, sha256(n::text::bytea), 'dc_managed_agents_v1', 1,
             timestamptz '2026-01-01' + n * interval '10 seconds', now()
         from generate_series(1, $1) n where $4 > 0".to_owned(),
        "insert into publication (source_id, event_id, event_created_at, queued_batch_id, state, attempts, next_attempt_at)
         select 1, id, created_at, batch_id, 'published', 1, created_at from usage_event where $1 + $2 + $3 + $4 > 0".to_owned(),
        "insert into settlement (source_id, event_id, batch_id, state)
         select 1, md5('usage' || n)::uuid::text, $3 + $1 / $2 + (n - 1) / $4, 'published' from generate_series(1, $1) n".to_owned(),
        format!(
            "insert into publication_request (id, source_id, license_sha256, events, sent_at, answered_at, status, batch_id)
             select {request}, 1, sha256('license'), $4, now(), now(), 200, $3 + $1 / $2 + (n - 1) / $4 from generate_series(1, $1, $4) n"
        ),
        format!(
            "insert into publication_attempt (request_id, source_id, event_id, verdict)
             select {request}, 1, md5('usage' || n)::uuid::text, 'accepted' from generate_series(1, $1) n where $2 + $3 > 0"
        ),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(statement))
            .bind(events)
            .bind(BATCH)
            .bind(offset)
            .bind(REQUEST)
            .execute(&mut connection)
            .await?;
    }
    sqlx::raw_sql("vacuum analyze").execute(&mut connection).await?;
    Ok(())
}
