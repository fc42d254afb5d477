//! The log on Kafka.

mod append;
mod client;
mod connection;
mod consumer;
mod decode;
mod gather;
mod marks;
mod offsets;
mod producer;
mod properties;
mod read;
mod readers;
mod rebalances;
mod settings;
mod topics;
mod unreadable;

pub use client::KafkaLog;
pub use properties::property_faults;
pub use settings::KafkaSettings;
