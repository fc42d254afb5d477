//! Tallyman's usage types, exactly as coderd stores them in `usage_events`.

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::cause::ParseError;
use super::fields::Fields;
use crate::words::words;

words! {
    /// The usage event types that this version knows. They are frozen once shipped.
    UsageType {
        /// Discrete: managed agents started, `{"count": N}`, N > 0. Daily rollup by sum.
        ManagedAgents = "dc_managed_agents_v1",
        /// Heartbeat: AI seats in use, `{"count": N}`, N >= 0. Daily rollup by maximum.
        AiSeats = "hb_ai_seats_v1",
        /// Heartbeat: agent runtime of one UTC hour in milliseconds, `{"runtime_ms": N}`, N >= 0.
        /// Daily rollup by sum.
        AgentRuntime = "hb_agent_runtime_v1",
    }
}

impl UsageType {
    /// The unit of the type's number.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            UsageType::ManagedAgents => "agents",
            UsageType::AiSeats => "seats",
            UsageType::AgentRuntime => "ms",
        }
    }

    /// Whether the quantities of a type add up. Otherwise each event repeats a level.
    #[must_use]
    pub fn adds_up(self) -> bool {
        self != UsageType::AiSeats
    }

    /// The only field of the type's data, which has the number.
    pub(super) fn field(self) -> &'static str {
        match self {
            UsageType::ManagedAgents | UsageType::AiSeats => "count",
            UsageType::AgentRuntime => "runtime_ms",
        }
    }

    /// The unit of a type by its name; none for a type that this version does not know.
    #[must_use]
    pub fn unit_of(event_type: &str) -> Option<&'static str> {
        event_type.parse().ok().map(UsageType::unit)
    }

    /// Tallyman's types begin with `dc_` or `hb_`. Such a type is billable even if this version
    /// does not know it.
    #[must_use]
    pub fn has_usage_prefix(event_type: &str) -> bool {
        event_type.starts_with("dc_") || event_type.starts_with("hb_")
    }
}

/// The quantity of used units, in the type's unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageQuantity {
    /// Managed agents started, at least 1.
    ManagedAgents(u64),
    /// Seats in use, at most `i64::MAX`.
    AiSeats(u64),
    /// Milliseconds of agent runtime, at most `i64::MAX`.
    AgentRuntimeMs(u64),
}

impl UsageQuantity {
    /// The quantity of that type, if the number is valid for it. Source: the payloads' own validity
    /// rules.
    pub fn new(usage_type: UsageType, quantity: u64) -> Result<Self, ParseError> {
        let invalid = |problem: &str| Err(ParseError::field(usage_type.field(), problem));
        match usage_type {
            UsageType::ManagedAgents if quantity == 0 => invalid("must be above 0"),
            UsageType::AiSeats | UsageType::AgentRuntime if i64::try_from(quantity).is_err() => {
                invalid("must fit 63 bits")
            }
            UsageType::ManagedAgents => Ok(UsageQuantity::ManagedAgents(quantity)),
            UsageType::AiSeats => Ok(UsageQuantity::AiSeats(quantity)),
            UsageType::AgentRuntime => Ok(UsageQuantity::AgentRuntimeMs(quantity)),
        }
    }

    #[must_use]
    pub fn usage_type(self) -> UsageType {
        match self {
            UsageQuantity::ManagedAgents(_) => UsageType::ManagedAgents,
            UsageQuantity::AiSeats(_) => UsageType::AiSeats,
            UsageQuantity::AgentRuntimeMs(_) => UsageType::AgentRuntime,
        }
    }

    /// The number, in the type's unit.
    #[must_use]
    pub fn number(self) -> u64 {
        match self {
            UsageQuantity::ManagedAgents(number)
            | UsageQuantity::AiSeats(number)
            | UsageQuantity::AgentRuntimeMs(number) => number,
        }
    }

    /// The payload as coderd and Tallyman write it, with one key.
    #[must_use]
    pub fn to_data(self) -> Value {
        serde_json::json!({ self.usage_type().field(): self.number() })
    }

    /// Reads the data of an event of this type.
    pub(super) fn read(usage_type: UsageType, data: Fields<'_>) -> Result<Self, ParseError> {
        UsageQuantity::new(usage_type, data.only_number(usage_type.field())?)
    }

    /// Parses coderd's stored `event_data` for an `event_type`.
    ///
    /// # Errors
    /// [`ParseError::UnknownEventType`] for a type that this version does not know; otherwise the
    /// fault of the payload.
    pub fn parse(event_type: &str, event_data: &[u8]) -> Result<Self, ParseError> {
        let usage_type =
            event_type.parse().map_err(|_| ParseError::UnknownEventType(event_type.to_owned()))?;
        UsageQuantity::read(usage_type, Fields::of(event_data)?)
    }
}

/// coderd's publish marks when first collected. They are never part of the digest.
#[derive(Clone, Debug, Default, PartialEq, sqlx::FromRow)]
pub struct PublishMarks {
    /// `usage_events.publish_started_at`: when a coderd replica began to publish it
    pub publish_started_at: Option<DateTime<Utc>>,
    /// `usage_events.published_at`: set on acceptance and on permanent refusal
    pub published_at: Option<DateTime<Utc>>,
    /// `usage_events.failure_message`
    pub failure_message: Option<String>,
}

/// One usage event.
#[derive(Clone, Debug, PartialEq)]
pub struct Usage {
    /// coderd's own id, which Tallyman gets unchanged.
    pub id: String,
    pub quantity: UsageQuantity,
    /// When the usage happened, not when the row was written.
    pub created_at: DateTime<Utc>,
    pub marks: PublishMarks,
}
