//! Sentences about the ledger's rows, for the command line, the API and the log.

use std::fmt::{self, Write as _};

use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use crate::ledger::{
    Finding, HoldScope, Landmark, LateAudit, Pause, Recovering, RestoreEvidence, Retirement,
};

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.topic.as_ref().map(|topic| format!(" of {topic}")).unwrap_or_default();
        write!(
            f,
            "{}{of} is paused by {} since {}: {}",
            self.operation.as_str(),
            self.actor,
            seconds(self.since),
            self.reason
        )
    }
}

impl fmt::Display for Retirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Retirement { deployment_id, actor, reason, .. } = self;
        let at = seconds(self.acted_at);
        write!(
            f,
            "source {deployment_id} was retired by {actor} at {at} ({reason}); to use it again, run \
             `tallyline sources reinstate {deployment_id} --reason WHY`"
        )
    }
}

impl fmt::Display for RestoreEvidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RestoreEvidence::Batch(Landmark { sequence, batch_id, recorded_at, .. }) => {
                write!(
                    f,
                    "batch {batch_id}, recorded at {recorded_at} with sequence {sequence}, is missing"
                )
            }
            RestoreEvidence::Position {
                generations, partition, next_offset, read_until, ..
            } => {
                write!(
                    f,
                    "incarnation {} had read {partition} up to offset {next_offset}",
                    generations.incarnation
                )?;
                read_until.map_or(Ok(()), |until| write!(f, " (a record of {until})"))?;
                f.write_str(", which this ledger lacks")
            }
            RestoreEvidence::Reported { .. } => f.write_str("an operator reported it"),
        }
    }
}

impl Recovering {
    /// Losses that neither the log nor a source can restore.
    pub const LOST_ACTS: &str = "acts of operators after the backup are missing from this ledger: pauses, choices of license rules, \
                                 acts on rejects, replays, rebuilds, recoveries, exports, \
                                 and acceptances, retirements and reinstatements of sources";

    /// A sentence about the operators' acts that this ledger lacks.
    #[must_use]
    pub fn lost_acts(&self) -> String {
        let last_act = self.last_act_at.map_or_else(
            || "It has no acts".to_owned(),
            |at| format!("Its last act is of {}", seconds(at)),
        );
        let sequence = self.ended_at_sequence;
        let end = self.ended_at.map_or_else(
            || "it was empty".to_owned(),
            |at| format!("it ended at sequence {sequence} of {}", seconds(at)),
        );
        format!("{}. {last_act}. When the restore was detected, {end}", Self::LOST_ACTS)
    }
}

impl fmt::Display for Recovering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the ledger was restored from a backup and has been catching up since {}: ",
            seconds(self.opened_at)
        )?;
        if !self.log_ends_known {
            return f.write_str("the ends of the log are not known yet");
        }
        let ids = |ids: &[Uuid]| {
            let text: Vec<String> = ids.iter().map(Uuid::to_string).collect();
            if text.is_empty() { String::new() } else { format!(" ({})", text.join(", ")) }
        };
        let Recovering { records_to_read, sources_to_read, sources_to_compare, without, .. } = self;
        write!(
            f,
            "{records_to_read} records of the log to read, {} sources to reread completely{}, {} sources to compare with coderd's \
             publish marks",
            sources_to_read.len(),
            ids(sources_to_read),
            sources_to_compare.len()
        )?;
        if without.is_empty() {
            Ok(())
        } else {
            write!(f, "; {} abandoned sources{}", without.len(), ids(without))
        }
    }
}

impl Finding {
    /// The differences as a sentence; none: the joint balances. The sentence stays the same while
    /// the findings stay the same.
    #[must_use]
    pub fn imbalance(&self) -> Option<String> {
        if self.differences == 0 {
            return None;
        }
        let noun = if self.differences == 1 { "difference" } else { "differences" };
        let mut sentence = format!("{} {noun} between {}", self.differences, self.joint);
        // Writing into a string cannot fail.
        if let Some(deployment) = self.deployment_id {
            let _ = write!(sentence, " of deployment {deployment}");
        }
        if let Some(first) = self.examples.first() {
            let _ = write!(sentence, " ({} {}: {})", first.kind, first.id, first.detail);
        }
        if let Some(deployment) = self.unaudited_deployment() {
            let since = seconds(self.audited_at);
            let _ = write!(
                sentence,
                ", not audited since {since}: if it is retired, run `tallyline sources retire {deployment}`"
            );
        }
        Some(sentence)
    }

    /// The reason for the finding's hold of this scope.
    #[must_use]
    pub fn hold_reason(&self, scope: HoldScope) -> String {
        match scope {
            HoldScope::Everything => self.imbalance().unwrap_or_default(),
            HoldScope::Source | HoldScope::Event => {
                format!(
                    "{} of {} usage events of the last 30 days differ from coderd's rows",
                    self.recent_usage_differs, self.recent_usage
                )
            }
        }
    }

    /// The condition that ends the finding's hold of this scope.
    #[must_use]
    pub fn hold_end(&self, scope: HoldScope) -> String {
        match scope {
            HoldScope::Everything => {
                "an audit in which this joint balances; `tallyline audit` lists the differences"
                    .to_owned()
            }
            HoldScope::Source | HoldScope::Event => {
                let retire = self
                    .unaudited_deployment()
                    .map(|id| format!("; if it is retired, run `tallyline sources retire {id}`"));
                let audit = "an audit in which at most 1 % differs; `tallyline audit` lists the differences";
                audit.to_owned() + &retire.unwrap_or_default()
            }
        }
    }
}

/// The sentence stays the same while the audit is late.
impl fmt::Display for LateAudit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the audit of {} is late: ", self.joint)?;
        match (self.since, self.audited_at) {
            (Some(since), _) => write!(f, "none has ended since {}", seconds(since)),
            (None, Some(_)) => f.write_str("it has not read all batches yet"),
            (None, None) => f.write_str("it was never audited"),
        }?;
        match &self.overridden {
            Some(by) => write!(
                f,
                "; {} publishes without it since {}: {}",
                by.actor,
                seconds(by.acted_at),
                by.reason
            ),
            None => Ok(()),
        }
    }
}

impl LateAudit {
    /// The condition that ends the hold.
    #[must_use]
    pub fn hold_end(&self) -> String {
        let of = self.deployment_id.map_or_else(|| "ledger".to_owned(), |id| id.to_string());
        format!(
            "an audit of this joint; to publish without it, run `tallyline resume publish --unaudited {of} --reason WHY`"
        )
    }
}

fn seconds(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Topic;
    use crate::ledger::Pausable;

    #[test]
    fn a_pause_names_its_actor_its_begin_and_its_reason() {
        let topic = Some(Topic::AgentUsage.name().to_owned());
        let (actor, reason) = ("user-001".into(), "a test".into());
        let pause = Pause {
            operation: Pausable::Consume,
            topic,
            actor,
            reason,
            since: DateTime::UNIX_EPOCH,
        };
        assert_eq!(
            pause.to_string(),
            "consume of tallyline.agent-usage.v1 is paused by user-001 since 1970-01-01T00:00:00Z: a test"
        );
    }
}
