//! The loop: one collector per source, pass after pass, until told to stop.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::open::Collector;
use super::settings::{CollectError, Settings};
use crate::clock::Clock;
use crate::coderd::Database;
use crate::ledger::Ledger;
use crate::license::PublicKeys;
use crate::log::Log;

/// Collects until `stop`. Whatever is wrong is said once and waited for; a source that another process collects is waited for too. A stop
/// in the middle of a pass drops it: what the log has acknowledged is found there by the next collector.
pub async fn run(
    settings: Settings,
    database: Database,
    keys: PublicKeys,
    log: Log,
    ledger: Ledger,
    clock: Clock,
    stop: CancellationToken,
) {
    let mut trouble = Trouble::default();
    while !stop.is_cancelled() {
        let opened = Collector::open(settings.clone(), database.clone(), keys.clone(), log.clone(), ledger.clone(), clock.clone());
        match stop.run_until_cancelled(opened).await {
            Some(Ok(Some(collector))) => {
                tracing::info!(source = %collector.source().deployment_id, database = %database.address(), "collecting");
                collect(collector, &stop, &mut trouble).await;
            }
            Some(Ok(None)) => trouble.say("another process collects this source; waiting for it to end"),
            Some(Err(error)) => trouble.say(&error.to_string()),
            None => return,
        }
        pause(settings.poll_interval, &stop).await;
    }
}

/// Passes until `stop` or until the source is another's.
async fn collect(mut collector: Collector, stop: &CancellationToken, trouble: &mut Trouble) {
    loop {
        match stop.run_until_cancelled(collector.pass()).await {
            Some(Ok(report)) => {
                trouble.over();
                let (builds, claims, usage, late) = (report.builds, report.claims, report.usage, report.late);
                tracing::debug!(builds, claims, usage, late, full_sweep = report.full_sweep, "pass recorded");
                if late > 0 {
                    tracing::warn!(late, "found later than claimed complete: is the margin smaller than the clocks' difference?");
                }
            }
            Some(Err(error @ CollectError::LeaseLost)) => return trouble.say(&error.to_string()),
            Some(Err(error)) => trouble.say(&error.to_string()),
            None => break,
        }
        if !pause(collector.settings.poll_interval, stop).await {
            break;
        }
    }
    collector.close().await;
}

/// Waits; false when it was told to stop.
async fn pause(length: Duration, stop: &CancellationToken) -> bool {
    stop.run_until_cancelled(tokio::time::sleep(length)).await.is_some()
}

/// Says what is wrong when it begins and when it changes, not each time it is met.
#[derive(Default)]
struct Trouble(Option<String>);

impl Trouble {
    fn say(&mut self, what: &str) {
        if self.0.as_deref() != Some(what) {
            tracing::warn!("{what}");
            self.0 = Some(what.to_owned());
        }
    }

    fn over(&mut self) {
        if self.0.take().is_some() {
            tracing::info!("collecting again");
        }
    }
}
