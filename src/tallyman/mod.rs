//! Tallyman's wire form and client.
//!
//! What is sent is made once per event ([`OutgoingEvent::to_json`]), so that a redelivery is byte for byte the same; what comes back
//! is one [`Verdict`] for each event that was sent ([`Answer::verdicts`]).

mod answer;
mod client;
mod event;

pub use answer::{Answer, LEFT_OUT_MESSAGE, Verdict, Verdicts};
pub use client::{ClientSettings, MAX_ANSWER_BYTES, SendError, SettingsError, TallymanClient};
pub use event::{InvalidEvent, MAX_EVENTS_PER_REQUEST, OutgoingEvent, request_body};
