//! Row `drain`: a queue of publications and a vendor that takes 50 ms a request, with 8 requests in
//! flight and with 32. The limits are one request after another, without any record of them, and one
//! `update … from unnest`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tallyline::clock::Clock;
use tallyline::event::UsageQuantity;
use tallyline::tallyman::{
    ClientSettings, MAX_EVENTS_PER_REQUEST, OutgoingEvent, TallymanClient, request_body,
};
use tallyline_sim::tallyman::{Config, Switches, Tallyman};
use tokio_util::sync::CancellationToken;

use crate::Suite;
use crate::coderd::Coderd;
use crate::process::Pipeline;
use crate::report::{Goal, Line};
use crate::servers::Database;

/// The vendor's time for a request.
const VENDOR_MS: u64 = 50;
const DEADLINE: Duration = Duration::from_secs(600);
const ALL_QUEUED: &str = "select exists (select from collector_progress, completeness(source_id, null) done where done.swept_pass_id > 0)";

/// Events a second of one drain and of its limits.
struct Rates {
    drained: f64,
    one_by_one: f64,
    updated: f64,
    note: String,
}

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    // with 8 the vendor's time is the larger part; with 32 it is not
    for concurrency in [8, 32] {
        let Rates { drained, one_by_one, updated, note } = rates(suite, concurrency).await?;
        let row = format!("drain, {concurrency} in flight");
        let by_requests = (one_by_one, "one request after another");
        let by_update = (updated, "update … from unnest");
        lines.push(
            Line::ratio(&row, drained, "events/s", by_requests, Goal::AtLeast(6.0)).with(note),
        );
        lines.push(Line::ratio(&row, drained, "events/s", by_update, Goal::AtLeast(0.5)));
    }
    Ok(lines)
}

/// Fills a queue and drains it with this number of requests in flight.
async fn rates(suite: &Suite, concurrency: u32) -> Result<Rates> {
    let events = suite.size(100_000, 1_000);
    let (coderd, ledger) = (Coderd::new(&suite.servers, 100).await?, suite.servers.ledger().await?);
    coderd.add_usage(events).await?;
    let stop = CancellationToken::new();
    let _stop_at_the_end = stop.clone().drop_guard();
    let switches = Switches { latency_ms: VENDOR_MS, ..Switches::default() };
    let config = Config { switches, ..Config::default() };
    let vendor = Tallyman::start(config, Clock::system(), stop.clone()).await?;
    let key = coderd.simulation.license_key();
    let pipeline = Pipeline::migrated(&format!(
        "ledger.url = '{}'\nsource.coderd_url = '{}'\npublish.mode = 'sole'\npublish.url = '{}'\npublish.interval_seconds = 0.5\npublish.concurrency = {concurrency}\n\
         [license.public_keys]\n'{}' = '''\n{}'''\n",
        ledger.url,
        coderd.database.url,
        vendor.ingest_url(),
        key.kid,
        key.public_key_pem,
    ))?;
    let mut collecting = pipeline.start(&["collect", "consume"], &[])?;
    ledger.wait("all usage is queued", DEADLINE, ALL_QUEUED).await?;
    collecting.stop().await?;
    let (drained, settled) = drain(&pipeline, &ledger).await?;
    ensure!(settled >= events, "{settled} of {events} publications are published");
    let requests = vendor.books().requests;
    let one_by_one = one_request_after_another(&vendor, settled.min(10_000)).await?;
    let updated = update(&ledger).await?;
    suite.servers.remove(&ledger).await?;
    suite.servers.remove(&coderd.database).await?;
    let note = format!("{settled} events, {requests} requests");
    Ok(Rates { drained, one_by_one, updated, note })
}

/// Publishes until nothing is pending. Returns events a second between the first and the last
/// settlement that it sees, and the number of published events.
async fn drain(pipeline: &Pipeline, ledger: &Database) -> Result<(f64, i64)> {
    let mut connection = ledger.connect().await?;
    let mut publishing = pipeline.start(&["publish"], &[])?;
    let pending = "select count(*) from publication where state = 'pending'";
    let all: i64 = sqlx::query_scalar(pending).fetch_one(&mut connection).await?;
    let (begun, mut first) = (Instant::now(), None);
    loop {
        let left: i64 = sqlx::query_scalar(pending).fetch_one(&mut connection).await?;
        if first.is_none() && left < all {
            first = Some((Instant::now(), left));
        }
        if let Some((at, before)) = first
            && left == 0
        {
            let rate = before as f64 / at.elapsed().as_secs_f64();
            publishing.stop().await?;
            let published = "select count(*) from publication where state = 'published'";
            return Ok((rate, sqlx::query_scalar(published).fetch_one(&mut connection).await?));
        }
        ensure!(begun.elapsed() < DEADLINE, "{left} publications are pending");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Events a second of a client that only sends, and waits for each answer.
async fn one_request_after_another(vendor: &Tallyman, events: i64) -> Result<f64> {
    let client = TallymanClient::new(&ClientSettings::new(vendor.ingest_url()))?;
    let events: Vec<OutgoingEvent> = (0..events)
        .map(|n| {
            OutgoingEvent::new(
                format!("limit-{n}"),
                UsageQuantity::ManagedAgents(1),
                Clock::system().now(),
            )
        })
        .collect::<Result<_, _>>()?;
    let begun = Instant::now();
    for request in events.chunks(MAX_EVENTS_PER_REQUEST) {
        client.ingest("license", uuid::Uuid::from_u128(1), request_body(request)).await?;
    }
    Ok(events.len() as f64 / begun.elapsed().as_secs_f64())
}

/// Events a second of one statement that settles the same rows.
async fn update(ledger: &Database) -> Result<f64> {
    let mut connection = ledger.connect().await?;
    sqlx::query("update publication set state = 'pending'").execute(&mut connection).await?;
    sqlx::raw_sql("vacuum analyze publication").execute(&mut connection).await?;
    sqlx::raw_sql("checkpoint").execute(&mut connection).await?;
    let ids: Vec<String> =
        sqlx::query_scalar("select event_id from publication").fetch_all(&mut connection).await?;
    let states = vec!["published"; ids.len()];
    let begun = Instant::now();
    sqlx::query(
        "update publication set state = new.state, unanswered = false, last_message = null
         from unnest($1::text[], $2::text[]) as new (event_id, state)
         where publication.source_id = 1 and publication.event_id = new.event_id",
    )
    .bind(&ids)
    .bind(&states)
    .execute(&mut connection)
    .await?;
    Ok(ids.len() as f64 / begun.elapsed().as_secs_f64())
}
