//! The integration tests, one binary (linking is what costs time). They need the servers that `scripts/test` starts.

mod publisher;
mod smoke;
mod support;
