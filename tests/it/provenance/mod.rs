//! The origin of records: signatures, their cutover, and registered sources. All tests run on a
//! real Kafka.

mod attack;
mod collector;
mod confirmed;
mod corrected;
mod cutover;
mod restored;
mod sources;
mod world;
