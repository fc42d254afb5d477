//! The handles of a process that the HTTP server reads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use prometheus::Registry;

use crate::event::TopicPartition;
use crate::ledger::Ledger;
use crate::log::Log;
use crate::pauses::Paused;
use crate::{coderd, publisher};

/// Handles of a process's parts, for any roles.
#[derive(Clone)]
pub struct ProcessHandles {
    /// For the check that it is reachable.
    pub ledger: Ledger,
    /// For the check that it is reachable.
    pub log: Log,
    /// Addresses of both for messages, without passwords.
    pub addresses: Addresses,
    /// Telemetry of all roles of the process.
    pub registry: Registry,
    /// Partitions that this process's consumer does not read, with reasons; `None` without a
    /// consumer.
    pub stopped_partitions: Option<Arc<Mutex<BTreeMap<TopicPartition, String>>>>,
    /// coderd's database; `None` if this process does not collect.
    pub coderd: Option<coderd::Database>,
    /// State of this process's publisher, set when it starts; `None` if this process does not
    /// publish.
    pub publisher: Option<Arc<OnceLock<publisher::ConditionHandle>>>,
    /// The pauses of operators.
    pub paused: Paused,
}

/// Addresses for operators, without passwords.
#[derive(Clone, Debug)]
pub struct Addresses {
    pub ledger: String,
    pub log: String,
}
