//! The three topics.

use std::fmt;

/// A topic of the log. Versioned and lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topic {
    /// Every completed build, keyed by workspace id.
    WorkspaceBuilds,
    /// Completed claims of prebuilt workspaces, keyed by workspace id.
    PrebuildClaims,
    /// Usage events, keyed by deployment id and event id.
    AgentUsage,
}

impl Topic {
    /// All topics, in the order in which they are created and shown.
    pub const ALL: [Topic; 3] = [Topic::WorkspaceBuilds, Topic::PrebuildClaims, Topic::AgentUsage];

    /// The topic's name, before any configured prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Topic::WorkspaceBuilds => "tallyline.workspace-builds.v1",
            Topic::PrebuildClaims => "tallyline.prebuild-claims.v1",
            Topic::AgentUsage => "tallyline.agent-usage.v1",
        }
    }

    /// The topic of that name, if it is one of ours.
    #[must_use]
    pub fn named(name: &str) -> Option<Topic> {
        Topic::ALL.into_iter().find(|topic| topic.name() == name)
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One partition of one topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    pub topic: Topic,
    /// The partition's number, from 0.
    pub partition: i32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}
