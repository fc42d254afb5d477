//! The log on Kafka.

mod append;
mod client;
mod connection;
mod consumer;
mod marks;
mod offsets;
mod producer;
mod properties;
mod read;
mod readers;
mod rebalances;
mod records;
mod settings;
mod topics;
mod unreadable;

pub use client::KafkaLog;
pub use properties::property_faults;
pub use settings::KafkaSettings;
