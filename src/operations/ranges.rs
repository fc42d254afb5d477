//! Ranges of the log, in the notation of `kafka-consumer-groups`.

use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{OUTSIDE_YEARS, OperationError, Operations, duration, instant, is_in_years};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{ReplayRange, positions};
use crate::log::Log;

/// Show the effect of rereading a range of the log, and the hash that identifies the plan when it
/// is executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct LogRange {
    /// Topics: `NAME` for all partitions, or `NAME:0,1,2` for some. Empty: all topics.
    // the command adds --all-topics: without topics, it asks for that flag
    #[arg(
        long = "topic",
        value_name = "NAME[:PARTITIONS]",
        required_unless_present = "all_topics",
        conflicts_with = "all_topics"
    )]
    #[serde(default)]
    pub topics: Vec<String>,
    /// Start of the range: `earliest`, `latest`, an offset, an instant (`2025-07-01T00:00:00.000`,
    /// UTC without an offset) or a duration before now (`2h`, `P1DT2H`).
    #[arg(long, value_name = "WHERE")]
    pub from: String,
    /// End of the range, not included. Same notation as `from`.
    #[arg(long, value_name = "WHERE", default_value = "latest")]
    #[serde(default = "latest")]
    pub until: String,
}

/// A requested end of a range that the log does not hold in one partition. The nearest offset of
/// the log replaces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MovedEnd {
    /// Name of the topic, without prefix.
    pub topic: String,
    /// Number of the partition.
    pub partition: i32,
    /// Which end: `from` or `until`.
    pub end: String,
    /// Requested offset.
    pub asked: i64,
    /// Offset used instead.
    pub taken: i64,
    /// First offset that the log holds.
    pub log_start: i64,
    /// Offset after the last record.
    pub log_end: i64,
}

fn latest() -> String {
    "latest".to_owned()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Edge {
    /// The start of the log.
    Earliest,
    /// The current end of the log.
    Latest,
    /// The record with this offset, from 0.
    Offset(i64),
    /// The first record at or after this instant, by the log's timestamps.
    Time(DateTime<Utc>),
    /// A duration before now.
    Ago(chrono::TimeDelta),
}

impl FromStr for Edge {
    type Err = String;

    fn from_str(text: &str) -> Result<Edge, String> {
        match text {
            "earliest" => return Ok(Edge::Earliest),
            "latest" => return Ok(Edge::Latest),
            _ => {}
        }
        if let Some(offset) = text.parse::<i64>().ok().filter(|offset| *offset >= 0) {
            return Ok(Edge::Offset(offset));
        }
        if let Some(ago) = duration(text) {
            return Ok(Edge::Ago(ago));
        }
        instant(text).map(Edge::Time).map_err(|problem| {
            if problem == OUTSIDE_YEARS {
                return problem;
            }
            "neither earliest, latest, an offset, an instant such as 2025-07-01T00:00:00.000 nor a duration such as 2h or P1DT2H".to_owned()
        })
    }
}

/// A topic and the named partitions; `None` for all.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub topic: Topic,
    pub partitions: Option<Vec<i32>>,
}

/// Parses `NAME` or `NAME:0,1,2`. `named` finds a topic by its name.
pub fn chosen(text: &str, named: impl Fn(&str) -> Option<Topic>) -> Result<Chosen, String> {
    let (name, list) = text.split_once(':').map_or((text, None), |(name, list)| (name, Some(list)));
    let topic = named(name).ok_or_else(|| {
        let names: Vec<&str> = Topic::ALL.iter().map(|topic| topic.name()).collect();
        format!("topic {name}: unknown; expected one of {}", names.join(", "))
    })?;
    let partitions = match list {
        None => None,
        Some(list) => {
            let parsed: Option<Vec<i32>> = list
                .split(',')
                .map(|one| one.trim().parse().ok().filter(|number| *number >= 0))
                .collect();
            Some(
                parsed
                    .ok_or_else(|| format!("{text}: partitions are numbers separated by commas"))?,
            )
        }
    };
    Ok(Chosen { topic, partitions })
}

impl Operations {
    /// Resolves a range to current offsets, each partition once and in order. Like
    /// `kafka-consumer-groups`, it replaces an offset that the log does not hold by the nearest
    /// one, and reports each replacement.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] for an unknown topic or partition, and for a range that ends
    /// before it begins.
    pub(super) async fn resolve(
        &self,
        range: &LogRange,
    ) -> Result<(Vec<ReplayRange>, Vec<MovedEnd>), OperationError> {
        let parse = |field, text: &str| {
            text.parse::<Edge>().map_err(|message| OperationError::Invalid { field, message })
        };
        let (from, until) = (parse("from", &range.from)?, parse("until", &range.until)?);
        let now = self.ledger.clock.now();
        let mut ranges = Vec::new();
        let mut moved = Vec::new();
        for partition in partitions(&self.log, &range.topics).await? {
            // stop at the readable end: a replay beyond it would skip records that become readable
            // later
            let (start, _) = self.log.watermarks(partition).await?;
            let watermarks = (start, self.log.readable_end(partition).await?);
            let first_offset =
                place(&self.log, partition, ("from", from), now, watermarks, &mut moved).await?;
            let end_offset =
                place(&self.log, partition, ("until", until), now, watermarks, &mut moved).await?;
            if first_offset > end_offset {
                let message = format!(
                    "{partition}: the range would begin at {first_offset} and end at {end_offset}"
                );
                return Err(OperationError::Invalid { field: "until", message });
            }
            let generation =
                self.ledger.run(async |conn| positions::generation(conn, partition).await).await?;
            ranges.push(ReplayRange {
                partition,
                generation,
                first_offset,
                next_offset: first_offset,
                end_offset,
            });
        }
        Ok((ranges, moved))
    }
}

async fn partitions(log: &Log, topics: &[String]) -> Result<Vec<TopicPartition>, OperationError> {
    let wrong = |message: String| OperationError::Invalid { field: "topics", message };
    let chosen: Vec<Chosen> = if topics.is_empty() {
        Topic::ALL.into_iter().map(|topic| Chosen { topic, partitions: None }).collect()
    } else {
        topics
            .iter()
            .map(|text| chosen(text, |name| log.topic(name)))
            .collect::<Result<_, _>>()
            .map_err(wrong)?
    };
    let mut partitions = Vec::new();
    for Chosen { topic, partitions: named } in chosen {
        let all = log.partitions(topic).await?;
        if let Some(missing) = named.iter().flatten().find(|partition| !all.contains(partition)) {
            return Err(wrong(format!(
                "{topic}: partition {missing} does not exist; expected one of {all:?}"
            )));
        }
        partitions.extend(
            named.unwrap_or(all).into_iter().map(|partition| TopicPartition { topic, partition }),
        );
    }
    partitions.sort_unstable_by_key(|partition| (partition.topic.name(), partition.partition));
    partitions.dedup();
    Ok(partitions)
}

async fn place(
    log: &Log,
    partition: TopicPartition,
    (field, edge): (&'static str, Edge),
    now: DateTime<Utc>,
    (log_start, log_end): (i64, i64),
    moved: &mut Vec<MovedEnd>,
) -> Result<i64, OperationError> {
    Ok(match edge {
        Edge::Earliest => log_start,
        Edge::Latest => log_end,
        Edge::Time(time) => log.offset_at(partition, time).await?,
        Edge::Ago(ago) => {
            let too_far = || OperationError::Invalid {
                field,
                message: "the duration reaches too far back".to_owned(),
            };
            log.offset_at(
                partition,
                now.checked_sub_signed(ago)
                    .filter(|time| is_in_years(*time))
                    .ok_or_else(too_far)?,
            )
            .await?
        }
        Edge::Offset(offset) => {
            let held = offset.clamp(log_start, log_end);
            if held != offset {
                let topic = partition.topic.name().to_owned();
                let (partition, end) = (partition.partition, field.to_owned());
                moved.push(MovedEnd {
                    topic,
                    partition,
                    end,
                    asked: offset,
                    taken: held,
                    log_start,
                    log_end,
                });
            }
            held
        }
    })
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn edges_in_the_words_of_kafka() {
        let edge = |text: &str| text.parse::<Edge>();
        assert_eq!(
            (edge("earliest"), edge("latest"), edge("17")),
            (Ok(Edge::Earliest), Ok(Edge::Latest), Ok(Edge::Offset(17)))
        );
        for hour in ["PT1H", "1h", "60m"] {
            assert_eq!(edge(hour), Ok(Edge::Ago(TimeDelta::hours(1))), "{hour}");
        }
        let time = DateTime::from_timestamp(1_751_328_000, 0).expect("in range");
        assert_eq!(
            (edge("2025-07-01T00:00:00.000"), edge("2025-07-01T02:00:00+02:00")),
            (Ok(Edge::Time(time)), Ok(Edge::Time(time)))
        );
        // Kafka treats a millisecond before 1970 as `latest`
        assert_eq!(edge("1969-12-31T23:59:59.999Z"), Err(OUTSIDE_YEARS.to_owned()));
        assert!(edge("-1").is_err() && edge("first").is_err() && edge("").is_err());
    }

    #[test]
    fn topics_with_partitions_and_with_a_prefix() {
        let chosen = |text, prefix: &str| {
            chosen(text, |name| {
                name.parse::<Topic>()
                    .ok()
                    .or_else(|| name.strip_prefix(prefix)?.parse::<Topic>().ok())
            })
        };
        let builds = |partitions| Ok(Chosen { topic: Topic::WorkspaceBuilds, partitions });
        assert_eq!(chosen("tallyline.workspace-builds.v1", ""), builds(None));
        assert_eq!(chosen("x.tallyline.workspace-builds.v1:0,2", "x."), builds(Some(vec![0, 2])));
        assert_eq!(chosen("tallyline.workspace-builds.v1:5", "x."), builds(Some(vec![5])));
        for wrong in [
            "workspace-builds",
            "tallyline.workspace-builds.v1:",
            "tallyline.workspace-builds.v1:a",
            "tallyline.workspace-builds.v1:-1",
        ] {
            assert!(chosen(wrong, "").is_err(), "{wrong}");
        }
    }
}
