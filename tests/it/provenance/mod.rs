//! Where records come from: signatures, the cutover from which on they bind, and registered sources. All on a real Kafka.

mod attack;
mod collector;
mod confirmed;
mod cutover;
mod restored;
mod sources;
mod world;
