//! One log with two backends: Kafka and PostgreSQL.
