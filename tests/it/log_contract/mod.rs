//! The promises of every log: one body for each promise, run on Kafka and PostgreSQL.

mod append;
mod group;
mod read;
mod site;

use tallyline::event::{Message, Topic, TopicPartition};

/// Runs bodies on both logs.
macro_rules! on_both_logs {
    ($($body:ident),* $(,)?) => {
        mod on_kafka {
            use crate::log_contract::site::{Kind, Site};
            $(#[tokio::test(flavor = "multi_thread")] async fn $body() { super::$body(Site::new(Kind::Kafka).await).await; })*
        }
        mod on_postgres {
            use crate::log_contract::site::{Kind, Site};
            $(#[tokio::test(flavor = "multi_thread")] async fn $body() { super::$body(Site::new(Kind::Postgres).await).await; })*
        }
    };
}
pub(crate) use on_both_logs;

/// Runs bodies about groups on both logs, on Kafka with each group protocol.
macro_rules! on_every_group {
    ($($body:ident),* $(,)?) => {
        crate::log_contract::on_both_logs!($($body),*);
        mod on_kafka_eager {
            use crate::log_contract::site::{Kind, Site};
            $(#[tokio::test(flavor = "multi_thread")] async fn $body() { super::$body(Site::new(Kind::KafkaEager).await).await; })*
        }
        mod on_kafka_new_protocol {
            use crate::log_contract::site::{Kind, Site};
            $(#[tokio::test(flavor = "multi_thread")] async fn $body() { super::$body(Site::new(Kind::KafkaNewProtocol).await).await; })*
        }
    };
}
pub(crate) use on_every_group;

const BUILDS: Topic = Topic::WorkspaceBuilds;

fn builds(partition: i32) -> TopicPartition {
    TopicPartition { topic: BUILDS, partition }
}

/// A message whose body identifies it.
fn message(key: &str, body: &str) -> Message {
    Message {
        key: Some(key.as_bytes().to_vec()),
        headers: vec![("ce_id".to_owned(), Some(body.as_bytes().to_vec()))],
        payload: Some(body.as_bytes().to_vec()),
        oversized: None,
    }
}

fn body(message: &Message) -> String {
    String::from_utf8(message.payload.clone().expect("a body")).expect("text")
}
