//! Tallyman's ingest endpoint, as the vendor runs it.
