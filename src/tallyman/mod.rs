//! Tallyman's wire form and client.
//!
//! An event's bytes are always the same ([`OutgoingEvent::to_json`]), so a redelivery is identical.
//! The answer becomes one [`Verdict`] for each event that was sent ([`Answer::verdicts`]).

mod answer;
mod client;
mod error;
mod event;

pub use answer::{Answer, LEFT_OUT_MESSAGE, Verdict, Verdicts};
pub use client::{ClientSettings, MAX_ANSWER_BYTES, SettingsError, TallymanClient};
pub use error::SendError;
pub use event::{InvalidEvent, MAX_EVENTS_PER_REQUEST, OutgoingEvent, request_body};
