//! The loop: one collector per source, one pass after another, until a stop.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::open::Collector;
use super::settings::{CollectError, Settings};
use super::status::CollectorStatus;
use crate::cause::LastingFault;
use crate::clock::Clock;
use crate::coderd::Database;
use crate::ledger::{Ledger, Pausable};
use crate::license::PublicKeys;
use crate::log::Log;

/// Collects until `stop`. Logs a failure once and retries; it also waits for a source that another
/// process collects. A stop drops a running pass: the next collector finds the acknowledged records
/// in the log. A pause lets the pass end, releases the lease and leaves coderd's database alone.
/// After the pause, the first process to take the lease collects.
pub async fn run(
    settings: Settings,
    database: Database,
    keys: PublicKeys,
    log: Log,
    ledger: Ledger,
    clock: Clock,
    stop: CancellationToken,
) {
    let mut reporter =
        Reporter { logged: LastingFault::default(), status: settings.status.clone() };
    let mut paused = settings.paused.clone();
    while !stop.is_cancelled() {
        if let Some(pause) = paused.of(Pausable::Collect) {
            reporter.status.set(&pause.to_string());
            if stop.run_until_cancelled(paused.resumed(Pausable::Collect)).await.is_none() {
                return;
            }
        }
        let mut wait = settings.poll_interval;
        let opened = Collector::open(
            settings.clone(),
            database.clone(),
            keys.clone(),
            log.clone(),
            ledger.clone(),
            clock.clone(),
        );
        match stop.run_until_cancelled(opened).await {
            Some(Ok(Some(collector))) => {
                tracing::info!(source = %collector.source().deployment_id, database = %database.address(), "collecting");
                reporter.status.set("collecting");
                if !collect(collector, &stop, &mut reporter).await {
                    return stop.cancelled().await;
                }
            }
            Some(Ok(None)) => {
                reporter
                    .report_failure("another process collects this source; waiting for it to end");
                // the lease of a killed process ends soon
                wait = wait.min(settings.lease_length.div_f64(3.0));
            }
            Some(Err(error)) => reporter.report_failure(&error.to_string()),
            None => return,
        }
        pause(wait, &stop).await;
    }
}

/// Runs passes until `stop`, a pause, or the loss of the source. False: this process must not open
/// the source again. It would append the same rows with a signature that consumers reject.
async fn collect(
    mut collector: Collector,
    stop: &CancellationToken,
    reporter: &mut Reporter,
) -> bool {
    let mut accepted = true;
    while collector.settings.paused.of(Pausable::Collect).is_none() {
        match stop.run_until_cancelled(collector.pass()).await {
            Some(Ok(report)) => {
                reporter.report_success(collector.warning().as_deref());
                let (builds, claims, usage, late) =
                    (report.builds, report.claims, report.usage, report.late);
                tracing::debug!(
                    builds,
                    claims,
                    usage,
                    late,
                    full_sweep = report.full_sweep,
                    "pass recorded"
                );
                if late > 0 {
                    tracing::warn!(
                        late,
                        "rows arrived after their time was reported complete: is collect.margin_seconds below the clock difference?"
                    );
                }
            }
            Some(Err(error @ CollectError::LeaseLost)) => {
                reporter.report_failure(&error.to_string());
                return true;
            }
            // another process may have the key or the right coderd: release the lease to it
            Some(Err(
                error @ (CollectError::NoSigningKey
                | CollectError::SignaturesRejected
                | CollectError::OtherKeyRejected
                | CollectError::WrongCoderd(_)),
            )) => {
                accepted = !matches!(error, CollectError::SignaturesRejected);
                reporter.report_failure(&error.to_string());
                break;
            }
            Some(Err(error)) => reporter.report_failure(&error.to_string()),
            None => break,
        }
        let mut paused = collector.settings.paused.clone();
        let changed = async {
            while paused.of(Pausable::Collect).is_none() {
                paused.changed().await;
            }
        };
        tokio::select! {
            waited = pause(collector.settings.poll_interval, stop) => if !waited { break },
            () = changed => {}
        }
    }
    collector.close().await;
    accepted
}

/// Waits for `length`. False: stopped.
async fn pause(length: Duration, stop: &CancellationToken) -> bool {
    stop.run_until_cancelled(tokio::time::sleep(length)).await.is_some()
}

/// Logs each failure once, and sets the shown state.
struct Reporter {
    logged: LastingFault,
    status: CollectorStatus,
}

impl Reporter {
    fn report_failure(&mut self, text: &str) {
        if self.logged.is_new(text) {
            tracing::warn!("{text}");
        }
        self.status.set(text);
    }

    fn report_success(&mut self, warning: Option<&str>) {
        let status =
            warning.map_or("collecting".to_owned(), |warning| format!("collecting, but {warning}"));
        match warning {
            Some(warning) if self.logged.is_new(warning) => tracing::warn!("{status}"),
            None if self.logged.end() => tracing::info!("collecting again"),
            _ => {}
        }
        self.status.set(&status);
    }
}
