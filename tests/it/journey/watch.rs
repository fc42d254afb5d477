//! A scraper beside the journey: no series ever falls or disappears, whichever process shows the
//! domain series.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::site::page;

/// Values by series on the text page.
type Series = BTreeMap<String, f64>;

/// The scraper's observations until now.
#[derive(Clone, Debug, Default)]
pub struct Observations {
    /// The last page.
    pub series: Series,
    /// Which of the two answered; each change once.
    pub holders: Vec<usize>,
    /// Pages with domain series.
    pub pages: usize,
    /// Pages with something new.
    pub changed: usize,
    /// Violations.
    pub faults: Vec<String>,
}

impl Observations {
    fn add(&mut self, holder: usize, series: Series) {
        for (name, before) in &self.series {
            match series.get(name) {
                None => self.faults.push(format!("{name} has disappeared, it was {before}")),
                Some(now) if now < before => {
                    self.faults.push(format!("{name} fell from {before} to {now}"))
                }
                Some(_) => {}
            }
        }
        self.pages += 1;
        self.changed += usize::from(self.series != series);
        self.series = series;
        if self.holders.last() != Some(&holder) {
            self.holders.push(holder);
        }
    }
}

/// The running scraper.
pub struct Watch {
    observations: Arc<Mutex<Observations>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Watch {
    /// Scrapes both addresses in turn, five times a second, one request at a time.
    pub fn start(metrics: [String; 2]) -> Watch {
        let (observations, stop) =
            (Arc::new(Mutex::new(Observations::default())), CancellationToken::new());
        let (recorder, signal) = (Arc::clone(&observations), stop.clone());
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(200));
            while signal.run_until_cancelled(ticks.tick()).await.is_some() {
                for (holder, address) in metrics.iter().enumerate() {
                    let series = parsed(&page(address).await.unwrap_or_default());
                    if !series.is_empty() {
                        recorder.lock().expect("no panic").add(holder, series);
                    }
                }
            }
        });
        Watch { observations, stop, task }
    }

    /// The processes that showed the series, in order.
    pub fn holders(&self) -> Vec<usize> {
        self.observations.lock().expect("no panic").holders.clone()
    }

    pub async fn end(self) -> Observations {
        self.stop.cancel();
        self.task.await.expect("no panic");
        self.observations.lock().expect("no panic").clone()
    }
}

/// The samples of a text page.
pub fn parsed(page: &str) -> Series {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').expect("a value"))
        .map(|(name, value)| (name.to_owned(), value.parse().expect("a number")))
        .collect()
}

#[test]
fn a_fall_and_a_series_that_is_gone_are_faults() {
    let series = |text: &str| parsed(text);
    let mut observations = Observations::default();
    observations.add(0, series("a{x=\"1 2\"} 5\nb 1\n"));
    observations.add(1, series("a{x=\"1 2\"} 5\nb 2\nc 1\n"));
    assert_eq!(
        (observations.faults.len(), observations.holders.clone(), observations.changed),
        (0, vec![0, 1], 2)
    );
    observations.add(1, series("a{x=\"1 2\"} 4\nc 1\n"));
    assert_eq!(
        observations.faults,
        ["a{x=\"1 2\"} fell from 5 to 4", "b has disappeared, it was 2"]
    );
}
