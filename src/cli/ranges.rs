//! Ranges of the log, in the words of `kafka-consumer-groups`.

use chrono::{DateTime, Utc};

use super::{Exit, Failure, instant};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{Ledger, ReplayRange};
use crate::log::Log;

/// Which part of the log.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct RangeArguments {
    /// A topic, with all its partitions or with some: NAME or NAME:0,1,2; may be repeated
    #[arg(long, value_name = "NAME[:PARTITIONS]", required_unless_present = "all_topics", conflicts_with = "all_topics")]
    topic: Vec<String>,
    /// All topics
    #[arg(long)]
    all_topics: bool,
    /// Where to begin: earliest, latest, an offset, an instant (2025-07-01T00:00:00.000, UTC unless it says otherwise) or a duration ago (P1DT2H)
    #[arg(long, value_name = "WHERE", value_parser = edge)]
    from: Edge,
    /// Where to end, not included: as --from
    #[arg(long, value_name = "WHERE", default_value = "latest", value_parser = edge)]
    until: Edge,
}

/// One end of a range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Edge {
    Earliest,
    Latest,
    Offset(i64),
    /// The first record at or after it, by the log's own time.
    Time(DateTime<Utc>),
    /// So long before now.
    Ago(chrono::TimeDelta),
}

fn edge(text: &str) -> Result<Edge, String> {
    match text {
        "earliest" => return Ok(Edge::Earliest),
        "latest" => return Ok(Edge::Latest),
        _ => {}
    }
    if let Some(offset) = text.parse::<i64>().ok().filter(|offset| *offset >= 0) {
        return Ok(Edge::Offset(offset));
    }
    if let Some(ago) = instant::iso_duration(text) {
        return Ok(Edge::Ago(ago));
    }
    instant::instant(text).map(Edge::Time).map_err(|_| {
        "neither earliest, latest, an offset, an instant such as 2025-07-01T00:00:00.000 nor a duration such as P1DT2H".to_owned()
    })
}

/// A topic and the partitions that were named; none: all.
#[derive(Clone, Debug, PartialEq)]
struct Chosen {
    topic: Topic,
    partitions: Option<Vec<i32>>,
}

/// `prefix` is the one before every topic's name: a name may be given with or without it.
fn chosen(text: &str, prefix: &str) -> Result<Chosen, String> {
    let (name, list) = text.split_once(':').map_or((text, None), |(name, list)| (name, Some(list)));
    let topic = Topic::named(name).or_else(|| Topic::named(name.strip_prefix(prefix)?)).ok_or_else(|| {
        let names: Vec<&str> = Topic::ALL.iter().map(|topic| topic.name()).collect();
        format!("--topic {name}: there are {}", names.join(", "))
    })?;
    let partitions = match list {
        None => None,
        Some(list) => {
            let parsed: Option<Vec<i32>> = list.split(',').map(|one| one.trim().parse().ok().filter(|number| *number >= 0)).collect();
            Some(parsed.ok_or_else(|| format!("--topic {text}: partitions are numbers separated by commas"))?)
        }
    };
    Ok(Chosen { topic, partitions })
}

impl RangeArguments {
    /// The offsets that these words mean now, each partition once and in order. An offset that the log does not hold is brought to the nearest
    /// that it does, as `kafka-consumer-groups` does, and each such change is answered in words.
    ///
    /// # Errors
    /// [`Exit::Configuration`] for a topic or partition that is not there and for a range that ends before it begins; or the log's.
    pub async fn resolve(&self, log: &Log, ledger: &Ledger, prefix: &str) -> Result<(Vec<ReplayRange>, Vec<String>), Failure> {
        let now = ledger.clock.now();
        let mut ranges = Vec::new();
        let mut notes = Vec::new();
        for partition in self.partitions(log, prefix).await? {
            let (start, end) = log.watermarks(partition).await?;
            let first_offset = place(log, partition, self.from, now, (start, end), &mut notes).await?;
            let end_offset = place(log, partition, self.until, now, (start, end), &mut notes).await?;
            if first_offset > end_offset {
                let message = format!("{partition}: the range would begin at {first_offset} and end at {end_offset}");
                return Err(Failure::of(Exit::Configuration, message));
            }
            ranges.push(ReplayRange {
                partition,
                generation: ledger.generation(partition).await?,
                first_offset,
                next_offset: first_offset,
                end_offset,
            });
        }
        Ok((ranges, notes))
    }

    async fn partitions(&self, log: &Log, prefix: &str) -> Result<Vec<TopicPartition>, Failure> {
        let wrong = |message: String| Failure::of(Exit::Configuration, message);
        let chosen: Vec<Chosen> = if self.all_topics {
            Topic::ALL.into_iter().map(|topic| Chosen { topic, partitions: None }).collect()
        } else {
            self.topic.iter().map(|text| chosen(text, prefix)).collect::<Result<_, _>>().map_err(wrong)?
        };
        let mut partitions = Vec::new();
        for Chosen { topic, partitions: named } in chosen {
            let all = log.partitions(topic).await?;
            if let Some(missing) = named.iter().flatten().find(|partition| !all.contains(partition)) {
                return Err(wrong(format!("--topic {topic}: there is no partition {missing}, only {all:?}")));
            }
            partitions.extend(named.unwrap_or(all).into_iter().map(|partition| TopicPartition { topic, partition }));
        }
        partitions.sort_unstable();
        partitions.dedup();
        Ok(partitions)
    }
}

async fn place(
    log: &Log,
    partition: TopicPartition,
    edge: Edge,
    now: DateTime<Utc>,
    (start, end): (i64, i64),
    notes: &mut Vec<String>,
) -> Result<i64, Failure> {
    Ok(match edge {
        Edge::Earliest => start,
        Edge::Latest => end,
        Edge::Time(time) => log.offset_at(partition, time).await?,
        Edge::Ago(ago) => {
            let time = now.checked_sub_signed(ago).ok_or_else(|| Failure::of(Exit::Configuration, "the duration reaches too far back"))?;
            log.offset_at(partition, time).await?
        }
        Edge::Offset(offset) => {
            let held = offset.clamp(start, end);
            if held != offset {
                notes.push(format!("{partition}: offset {offset} is not in the log, which holds {start} to {end}; {held} is taken"));
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
        assert_eq!((edge("earliest"), edge("latest"), edge("17")), (Ok(Edge::Earliest), Ok(Edge::Latest), Ok(Edge::Offset(17))));
        assert_eq!(edge("PT1H"), Ok(Edge::Ago(TimeDelta::hours(1))));
        let time = DateTime::from_timestamp(1_751_328_000, 0).expect("in range");
        assert_eq!((edge("2025-07-01T00:00:00.000"), edge("2025-07-01T02:00:00+02:00")), (Ok(Edge::Time(time)), Ok(Edge::Time(time))));
        assert!(edge("-1").is_err() && edge("first").is_err() && edge("").is_err());
    }

    #[test]
    fn topics_with_partitions_and_with_a_prefix() {
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
