//! The bills of the simulated Tallyman, and every delivery's bytes.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::wire::{self, Received};

/// The simulated vendor's own truth, as `GET /sim/books` shows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Books {
    /// The number of requests, including refused and cut ones.
    pub requests: u64,
    /// Requests without an answer yet.
    pub in_flight: usize,
    /// The largest number of requests that were in flight at once.
    pub most_in_flight: usize,
    /// By deployment, then id.
    pub billed: Vec<Billed>,
    /// In the order of arrival.
    pub deliveries: Vec<Delivery>,
}

/// A billed event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Billed {
    /// The billed deployment.
    pub deployment_id: Uuid,
    /// The event's id.
    pub id: String,
    /// How often it was billed. More than once is an error, which the memory of ids prevents only
    /// for some time.
    pub times: usize,
    /// When, by the simulator's clock; one instant for each time.
    pub billed_at: Vec<DateTime<Utc>>,
    /// The type, as first billed.
    pub event_type: String,
    /// The data, as first billed.
    pub event_data: serde_json::Value,
    /// When the usage happened, as first billed.
    pub created_at: DateTime<Utc>,
}

/// One event in one request that was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Delivery {
    /// The number of the request, from 1.
    pub request: u64,
    /// When it was read, by the simulator's clock.
    pub at: DateTime<Utc>,
    /// From its header.
    pub deployment_id: Uuid,
    /// The event's id.
    pub id: String,
    /// The event's text, byte for byte as sent.
    pub json: String,
    /// The outcome of the event.
    pub outcome: Outcome,
    /// Whether an answer with the event was sent.
    pub answered: bool,
}

/// The outcome of a delivered event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Accepted and billed.
    Billed,
    /// Accepted; its id was remembered, so it was not billed again.
    Remembered,
    /// Refused for now.
    RefusedForNow,
    /// Refused permanently, by a switch.
    RefusedForEver,
    /// Refused permanently: older than 30 days.
    TooOld,
    /// Left out of the answer and not accepted.
    Omitted,
    /// The whole request failed before its events were read.
    RequestFailed,
}

impl Outcome {
    /// Whether the event was accepted, now or before.
    #[must_use]
    pub fn is_accepted(self) -> bool {
        matches!(self, Outcome::Billed | Outcome::Remembered)
    }
}

impl Books {
    #[must_use]
    pub fn times_billed(&self, deployment_id: Uuid, id: &str) -> usize {
        let event = self
            .billed
            .iter()
            .find(|billed| billed.deployment_id == deployment_id && billed.id == id);
        event.map_or(0, |billed| billed.times)
    }

    /// The texts of an event's deliveries, in order.
    #[must_use]
    pub fn texts(&self, deployment_id: Uuid, id: &str) -> Vec<&str> {
        let same =
            |delivery: &&Delivery| delivery.deployment_id == deployment_id && delivery.id == id;
        self.deliveries.iter().filter(same).map(|delivery| delivery.json.as_str()).collect()
    }
}

/// One request as one line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    request: u64,
    deliveries: Vec<Delivery>,
}

/// The open books.
pub struct Bookkeeping {
    remember: TimeDelta,
    requests: u64,
    in_flight: usize,
    most_in_flight: usize,
    billed: BTreeMap<(Uuid, String), Billed>,
    deliveries: Vec<Delivery>,
    file: Option<File>,
}

impl Bookkeeping {
    /// Continues the books in `file` if there is one, else starts empty. Remembers ids for
    /// `remember`.
    pub fn open(remember: TimeDelta, file: Option<&Path>) -> anyhow::Result<Self> {
        let mut books = Bookkeeping {
            remember,
            requests: 0,
            in_flight: 0,
            most_in_flight: 0,
            billed: BTreeMap::new(),
            deliveries: Vec::new(),
            file: None,
        };
        if let Some(path) = file {
            books.file = Some(
                books
                    .continue_from(path)
                    .with_context(|| format!("books in {}", path.display()))?,
            );
        }
        Ok(books)
    }

    /// Reads the lines of an earlier run. A last line without its end was never answered, and is
    /// cut off.
    fn continue_from(&mut self, path: &Path) -> anyhow::Result<File> {
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        for (number, line) in text[..whole].lines().enumerate() {
            let line: Line =
                serde_json::from_str(line).with_context(|| format!("line {}", number + 1))?;
            self.requests = self.requests.max(line.request);
            for delivery in line.deliveries {
                if delivery.outcome == Outcome::Billed {
                    let event = wire::parse_event(&delivery.json)
                        .map_err(|error| anyhow!("line {}: {error}", number + 1))?;
                    self.bill(delivery.deployment_id, &event, delivery.at);
                }
                self.deliveries.push(delivery);
            }
        }
        file.set_len(whole as u64)?;
        file.seek(SeekFrom::End(0))?;
        Ok(file)
    }

    /// The number of the next request.
    pub fn next_request(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// A request has arrived.
    pub fn enter(&mut self) {
        self.in_flight += 1;
        self.most_in_flight = self.most_in_flight.max(self.in_flight);
    }

    /// A request has its answer, or its client is gone.
    pub fn leave(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Bills the event unless its id is remembered.
    pub fn take(&mut self, deployment_id: Uuid, event: &Received, now: DateTime<Utc>) -> Outcome {
        let last = self
            .billed
            .get(&(deployment_id, event.id.clone()))
            .and_then(|billed| billed.billed_at.last());
        if last.is_some_and(|last| now - *last < self.remember) {
            return Outcome::Remembered;
        }
        self.bill(deployment_id, event, now);
        Outcome::Billed
    }

    fn bill(&mut self, deployment_id: Uuid, event: &Received, now: DateTime<Utc>) {
        let billed =
            self.billed.entry((deployment_id, event.id.clone())).or_insert_with(|| Billed {
                deployment_id,
                id: event.id.clone(),
                times: 0,
                billed_at: Vec::new(),
                event_type: event.event_type.clone(),
                event_data: event.event_data.clone(),
                created_at: event.created_at,
            });
        billed.times += 1;
        billed.billed_at.push(now);
    }

    /// Writes a request down, in memory and in the file, before its answer: a kill after the answer
    /// loses nothing.
    pub fn record(&mut self, request: u64, deliveries: Vec<Delivery>) -> anyhow::Result<()> {
        let line = Line { request, deliveries };
        if let Some(file) = &mut self.file {
            let mut text = serde_json::to_string(&line)?;
            text.push('\n');
            file.write_all(text.as_bytes()).context("writing the books")?;
        }
        self.deliveries.extend(line.deliveries);
        Ok(())
    }

    pub fn books(&self) -> Books {
        Books {
            requests: self.requests,
            in_flight: self.in_flight,
            most_in_flight: self.most_in_flight,
            billed: self.billed.values().cloned().collect(),
            deliveries: self.deliveries.clone(),
        }
    }
}
