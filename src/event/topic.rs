//! The three topics.

use std::fmt;

use crate::words::words;

words! {
    /// A topic of the log, by its name before any configured prefix. Names have a version and are
    /// in lower case.
    Topic {
        /// Every completed build, keyed by workspace id.
        WorkspaceBuilds = "tallyline.workspace-builds.v1",
        /// Completed prebuild claims, keyed by workspace id.
        PrebuildClaims = "tallyline.prebuild-claims.v1",
        /// Usage events, keyed by deployment id and event id.
        AgentUsage = "tallyline.agent-usage.v1",
    }
}

impl Topic {
    /// The topic's name, before any configured prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.as_str()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::FromRow)]
pub struct TopicPartition {
    pub topic: Topic,
    /// The number of the partition, from 0.
    pub partition: i32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}
