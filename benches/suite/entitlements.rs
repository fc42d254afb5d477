//! Rows `entitlements` and `count`: the answers that coderd enforces licenses by, against a bare
//! axum handler that returns the same bytes; and the first one beside an intake.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::coderd::Coderd;
use crate::http::{Bare, requests_a_second};
use crate::process::{Pipeline, Process, answers, free_port};
use crate::report::{Goal, Line, median};
use crate::{Suite, Task, beside};

const ROUNDS: usize = 3;
const SWEPT: &str = "select exists (select from collector_progress, completeness(source_id, null) done where done.swept_pass_id > 0)";
const READY: Duration = Duration::from_secs(60);

pub async fn measure(suite: &Suite) -> Result<Vec<Line>> {
    let coderd = Coderd::new(&suite.servers, suite.size(2_000, 200)).await?;
    let ledger = suite.servers.ledger().await?;
    let key = coderd.simulation.license_key();
    let api = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let pipeline = Pipeline::migrated(&format!(
        "ledger.url = '{}'\nsource.coderd_url = '{}'\nserve.api_listen = '{api}'\nserve.metrics_listen = '127.0.0.1:{}'\n\
         [license.public_keys]\n'{}' = '''\n{}'''\n",
        ledger.url,
        coderd.database.url,
        free_port()?,
        key.kid,
        key.public_key_pem,
    ))?;
    let mut collecting = pipeline.start(&["collect", "consume"], &[])?;
    ledger.wait("the deployment is collected", Duration::from_secs(300), SWEPT).await?;
    collecting.stop().await?;
    let mut serving = pipeline.start(&["serve"], &[])?;
    answers(&format!("http://{api}/readyz"), READY).await?;
    let mut lines = Vec::new();
    let count = "/api/v1/managed-agents/count?start=2026-01-01T00:00:00Z&end=2027-01-01T00:00:00Z";
    for (row, path) in [("entitlements", "/api/v2/entitlements"), ("count", count)] {
        lines.push(compare(suite, row, api, path, &serving).await?);
    }
    serving.stop().await?;
    let half = lines[0].value / 2.0;
    lines.push(beside::measure(suite, half).await?);
    suite.servers.remove(&ledger).await?;
    suite.servers.remove(&coderd.database).await?;
    Ok(lines)
}

/// Both servers in turn. Each is a process of its own, and the client is this process.
async fn compare(
    suite: &Suite,
    row: &str,
    api: SocketAddr,
    path: &str,
    serving: &Process,
) -> Result<Line> {
    answers(&format!("http://{api}{path}"), READY).await?;
    let body = reqwest::get(format!("http://{api}{path}")).await?.text().await?;
    let bytes = body.len();
    let bare = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    let task = serde_json::to_string(&Task::Bare(Bare { listen: bare, body }))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--task", &task]);
    let bare_process = Process::spawn(command)?;
    answers(&format!("http://{bare}/"), READY).await?;
    let length = suite.size(Duration::from_secs(5), Duration::from_millis(500));
    let (mut ours, mut limits, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for own in if round % 2 == 0 { [true, false] } else { [false, true] } {
            let (server, process) = if own { (api, serving) } else { (bare, &bare_process) };
            let before = process.cpu_seconds()?;
            let path = path.to_owned();
            let asking =
                tokio::task::spawn_blocking(move || requests_a_second(server, &path, length));
            let rate = asking.await??;
            if own {
                ours.push(rate)
            } else {
                limits.push(rate)
            }
            let cores = (process.cpu_seconds()? - before) / length.as_secs_f64();
            busy.push(format!("{} {cores:.2}", if own { "Tallyline" } else { "bare" }));
        }
    }
    let note = format!("{bytes} bytes; cores used by the server: {}", busy.join(", "));
    let limit = (median(limits), "bare axum handler");
    Ok(Line::ratio(row, median(ours), "requests/s", limit, Goal::AtLeast(0.8)).with(note))
}
