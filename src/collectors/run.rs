//! The loop: one collector per source, pass after pass, until told to stop.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::open::Collector;
use super::settings::{CollectError, Settings};
use crate::cause::Lasting;
use crate::clock::Clock;
use crate::coderd::Database;
use crate::ledger::{Ledger, Pausable};
use crate::license::PublicKeys;
use crate::log::Log;

/// Collects until `stop`. Whatever is wrong is said once and waited for; a source that another process collects is waited for too. A stop
/// in the middle of a pass drops it: what the log has acknowledged is found there by the next collector. A pause lets the pass in hand end;
/// then the lease is given back and coderd's database left alone, and whoever is first collects once it is resumed.
pub async fn run(
    settings: Settings,
    database: Database,
    keys: PublicKeys,
    log: Log,
    ledger: Ledger,
    clock: Clock,
    stop: CancellationToken,
) {
    let mut trouble = Trouble { logged: Lasting::default(), standing: settings.standing.clone() };
    let mut paused = settings.paused.clone();
    while !stop.is_cancelled() {
        if let Some(pause) = paused.of(Pausable::Collect) {
            trouble.standing.set(&pause.to_string());
            if stop.run_until_cancelled(paused.resumed(Pausable::Collect)).await.is_none() {
                return;
            }
        }
        let mut wait = settings.poll_interval;
        let opened = Collector::open(settings.clone(), database.clone(), keys.clone(), log.clone(), ledger.clone(), clock.clone());
        match stop.run_until_cancelled(opened).await {
            Some(Ok(Some(collector))) => {
                tracing::info!(source = %collector.source().deployment_id, database = %database.address(), "collecting");
                trouble.standing.set("collecting");
                if !collect(collector, &stop, &mut trouble).await {
                    return stop.cancelled().await;
                }
            }
            Some(Ok(None)) => {
                trouble.say("another process collects this source; waiting for it to end");
                // one that is killed leaves a lease that ends soon
                wait = wait.min(settings.lease_length.div_f64(3.0));
            }
            Some(Err(error)) => trouble.say(&error.to_string()),
            None => return,
        }
        pause(wait, &stop).await;
    }
}

/// Passes until `stop`, until the source is another's, or until collecting is paused. False: this process must not open the source again, or it would
/// append the same rows with a signature that consumers reject.
async fn collect(mut collector: Collector, stop: &CancellationToken, trouble: &mut Trouble) -> bool {
    let mut accepted = true;
    while collector.settings.paused.of(Pausable::Collect).is_none() {
        match stop.run_until_cancelled(collector.pass()).await {
            Some(Ok(report)) => {
                trouble.over(collector.warning().as_deref());
                let (builds, claims, usage, late) = (report.builds, report.claims, report.usage, report.late);
                tracing::debug!(builds, claims, usage, late, full_sweep = report.full_sweep, "pass recorded");
                if late > 0 {
                    tracing::warn!(late, "found later than claimed complete: is the margin smaller than the clocks' difference?");
                }
            }
            Some(Err(error @ CollectError::LeaseLost)) => {
                trouble.say(&error.to_string());
                return true;
            }
            // another process may have the key or the right coderd: it gets the lease
            Some(Err(
                error @ (CollectError::NoSigningKey
                | CollectError::SignaturesRejected
                | CollectError::OtherKeyRejected
                | CollectError::NotItsCoderd(_)),
            )) => {
                accepted = !matches!(error, CollectError::SignaturesRejected);
                trouble.say(&error.to_string());
                break;
            }
            Some(Err(error)) => trouble.say(&error.to_string()),
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

/// Waits; false when it was told to stop.
async fn pause(length: Duration, stop: &CancellationToken) -> bool {
    stop.run_until_cancelled(tokio::time::sleep(length)).await.is_some()
}

/// How collecting stands, for whoever shows it; clones show the same.
#[derive(Clone, Debug, Default)]
pub struct Standing(Arc<Mutex<String>>);

impl Standing {
    /// In words; empty before it begins.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, words: &str) {
        words.clone_into(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What is wrong, logged and shown.
struct Trouble {
    logged: Lasting,
    standing: Standing,
}

impl Trouble {
    fn say(&mut self, what: &str) {
        if self.logged.is_news(what) {
            tracing::warn!("{what}");
        }
        self.standing.set(what);
    }

    fn over(&mut self, warning: Option<&str>) {
        let standing = warning.map_or("collecting".to_owned(), |warning| format!("collecting, but {warning}"));
        match warning {
            Some(warning) if self.logged.is_news(warning) => tracing::warn!("{standing}"),
            None if self.logged.has_ended() => tracing::info!("collecting again"),
            _ => {}
        }
        self.standing.set(&standing);
    }
}
