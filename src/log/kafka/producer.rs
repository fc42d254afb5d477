//! The log's client for appends.

use rdkafka::producer::FutureProducer;

use super::connection::Connection;

/// The log's producer, of which it has only one.
#[derive(Clone)]
pub(super) struct Producer {
    pub client: FutureProducer<Connection>,
    pub connection: Connection,
}
