//! The handles that the roles of one process share.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use crate::consumer::Consumer;
use crate::pauses::Paused;
use crate::{collectors, publisher};

/// Addresses where this process listens.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    pub api: SocketAddr,
    pub metrics: SocketAddr,
}

/// State of this process's publisher; set when it starts.
pub(super) type Publishing = Arc<OnceLock<publisher::ConditionHandle>>;

/// Inputs of this process's roles, and the places where they report their state.
#[derive(Clone)]
pub(super) struct Parts {
    pub consumer: Consumer,
    pub collecting: collectors::CollectorStatus,
    pub publishing: Publishing,
    pub paused: Paused,
}
