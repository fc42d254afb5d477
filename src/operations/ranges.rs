//! Ranges of the log, in the words of `kafka-consumer-groups`.

use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{CANNOT_BE, Desk, OperationError, can_be, instant, iso_duration};
use crate::event::{Topic, TopicPartition};
use crate::ledger::ReplayRange;
use crate::log::Log;

/// Which part of the log, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogRange {
    /// Topics, each with all its partitions or with some: `NAME` or `NAME:0,1,2`. None: all topics.
    #[serde(default)]
    pub topics: Vec<String>,
    /// Where to begin: `earliest`, `latest`, an offset, an instant (`2025-07-01T00:00:00.000`, UTC unless it says otherwise) or a duration ago
    /// (`P1DT2H`).
    pub from: String,
    /// Where to end, not included: as `from`.
    #[serde(default = "latest")]
    pub until: String,
}

/// An end of a range in one partition that is not the one that was asked for, because the log does not hold that offset: the nearest is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MovedEnd {
    /// The topic's name.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// `from` or `until`.
    pub end: String,
    /// The offset that was asked for.
    pub asked: i64,
    /// The offset that is taken.
    pub taken: i64,
    /// The first offset that the log holds.
    pub log_start: i64,
    /// The offset behind its last.
    pub log_end: i64,
}

fn latest() -> String {
    "latest".to_owned()
}

/// One end of a range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Edge {
    /// Where the log begins.
    Earliest,
    /// Where it ends now.
    Latest,
    /// The record with this offset, from 0 on.
    Offset(i64),
    /// The first record at or after it, by the log's own time.
    Time(DateTime<Utc>),
    /// So long before now.
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
        if let Some(ago) = iso_duration(text) {
            return Ok(Edge::Ago(ago));
        }
        instant(text).map(Edge::Time).map_err(|problem| {
            if problem == CANNOT_BE {
                return problem;
            }
            "neither earliest, latest, an offset, an instant such as 2025-07-01T00:00:00.000 nor a duration such as P1DT2H".to_owned()
        })
    }
}

/// A topic and the partitions that were named; none: all.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The topic.
    pub topic: Topic,
    /// The partitions as they were named.
    pub partitions: Option<Vec<i32>>,
}

/// `NAME` or `NAME:0,1,2`. `named` knows topics by their names.
pub fn chosen(text: &str, named: impl Fn(&str) -> Option<Topic>) -> Result<Chosen, String> {
    let (name, list) = text.split_once(':').map_or((text, None), |(name, list)| (name, Some(list)));
    let topic = named(name).ok_or_else(|| {
        let names: Vec<&str> = Topic::ALL.iter().map(|topic| topic.name()).collect();
        format!("{name} is no topic: there are {}", names.join(", "))
    })?;
    let partitions = match list {
        None => None,
        Some(list) => {
            let parsed: Option<Vec<i32>> = list.split(',').map(|one| one.trim().parse().ok().filter(|number| *number >= 0)).collect();
            Some(parsed.ok_or_else(|| format!("{text}: partitions are numbers separated by commas"))?)
        }
    };
    Ok(Chosen { topic, partitions })
}

impl Desk {
    /// The offsets that these words mean now, each partition once and in order. An offset that the log does not hold is brought to the nearest
    /// that it does, as `kafka-consumer-groups` does, and each such change is answered.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] for a topic or partition that is not there and for a range that ends before it begins; or the log's.
    pub(super) async fn resolve(&self, range: &LogRange) -> Result<(Vec<ReplayRange>, Vec<MovedEnd>), OperationError> {
        let parse = |field, text: &str| text.parse::<Edge>().map_err(|message| OperationError::Invalid { field, message });
        let (from, until) = (parse("from", &range.from)?, parse("until", &range.until)?);
        let now = self.ledger.clock.now();
        let mut ranges = Vec::new();
        let mut moved = Vec::new();
        for partition in partitions(&self.log, &range.topics).await? {
            // beyond the readable end nothing is decided: a replay up to there would leave out records that come to be read later
            let (start, _) = self.log.watermarks(partition).await?;
            let watermarks = (start, self.log.readable_end(partition).await?);
            let first_offset = place(&self.log, partition, ("from", from), now, watermarks, &mut moved).await?;
            let end_offset = place(&self.log, partition, ("until", until), now, watermarks, &mut moved).await?;
            if first_offset > end_offset {
                let message = format!("{partition}: the range would begin at {first_offset} and end at {end_offset}");
                return Err(OperationError::Invalid { field: "until", message });
            }
            let generation = self.ledger.in_time(self.ledger.generation(partition)).await?;
            ranges.push(ReplayRange { partition, generation, first_offset, next_offset: first_offset, end_offset });
        }
        Ok((ranges, moved))
    }
}

async fn partitions(log: &Log, topics: &[String]) -> Result<Vec<TopicPartition>, OperationError> {
    let wrong = |message: String| OperationError::Invalid { field: "topics", message };
    let chosen: Vec<Chosen> = if topics.is_empty() {
        Topic::ALL.into_iter().map(|topic| Chosen { topic, partitions: None }).collect()
    } else {
        topics.iter().map(|text| chosen(text, |name| log.topic(name))).collect::<Result<_, _>>().map_err(wrong)?
    };
    let mut partitions = Vec::new();
    for Chosen { topic, partitions: named } in chosen {
        let all = log.partitions(topic).await?;
        if let Some(missing) = named.iter().flatten().find(|partition| !all.contains(partition)) {
            return Err(wrong(format!("{topic}: there is no partition {missing}, only {all:?}")));
        }
        partitions.extend(named.unwrap_or(all).into_iter().map(|partition| TopicPartition { topic, partition }));
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
            let too_far = || OperationError::Invalid { field, message: "the duration reaches too far back".to_owned() };
            log.offset_at(partition, now.checked_sub_signed(ago).filter(|time| can_be(*time)).ok_or_else(too_far)?).await?
        }
        Edge::Offset(offset) => {
            let held = offset.clamp(log_start, log_end);
            if held != offset {
                let topic = partition.topic.name().to_owned();
                let (partition, end) = (partition.partition, field.to_owned());
                moved.push(MovedEnd { topic, partition, end, asked: offset, taken: held, log_start, log_end });
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
        assert_eq!((edge("earliest"), edge("latest"), edge("17")), (Ok(Edge::Earliest), Ok(Edge::Latest), Ok(Edge::Offset(17))));
        assert_eq!(edge("PT1H"), Ok(Edge::Ago(TimeDelta::hours(1))));
        let time = DateTime::from_timestamp(1_751_328_000, 0).expect("in range");
        assert_eq!((edge("2025-07-01T00:00:00.000"), edge("2025-07-01T02:00:00+02:00")), (Ok(Edge::Time(time)), Ok(Edge::Time(time))));
        // Kafka takes a millisecond before 1970 for `latest`
        assert_eq!(edge("1969-12-31T23:59:59.999Z"), Err(CANNOT_BE.to_owned()));
        assert!(edge("-1").is_err() && edge("first").is_err() && edge("").is_err());
    }

    #[test]
    fn topics_with_partitions_and_with_a_prefix() {
        let chosen = |text, prefix: &str| {
            chosen(text, |name| name.parse::<Topic>().ok().or_else(|| name.strip_prefix(prefix)?.parse::<Topic>().ok()))
        };
        let builds = |partitions| Ok(Chosen { topic: Topic::WorkspaceBuilds, partitions });
        assert_eq!(chosen("tallyline.workspace-builds.v1", ""), builds(None));
        assert_eq!(chosen("x.tallyline.workspace-builds.v1:0,2", "x."), builds(Some(vec![0, 2])));
        assert_eq!(chosen("tallyline.workspace-builds.v1:5", "x."), builds(Some(vec![5])));
        for wrong in
            ["workspace-builds", "tallyline.workspace-builds.v1:", "tallyline.workspace-builds.v1:a", "tallyline.workspace-builds.v1:-1"]
        {
            assert!(chosen(wrong, "").is_err(), "{wrong}");
        }
    }
}
