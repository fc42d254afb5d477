//! The HTTP server: `/metrics`, answers to coderd, operations of operators, and health checks.
//!
//! Answers come from memory, from two states that are folded along the ledger, and contain the
//! sequence of their state. Two loops of [`Server::run`] query the ledger: [`known`] for the
//! sources and their completeness, [`lease`] for the right to show the domain series.

mod agents;
mod answer;
mod chosen_source;
mod connections;
mod document;
mod entitlements;
mod error;
mod executions;
mod guard;
mod handles;
mod host;
mod known;
mod lease;
mod metrics;
mod metrics_lease;
mod openapi;
mod own;
mod paths;
mod plans;
mod probe;
mod ready;
mod received;
mod recent;
mod rejects;
mod route;
mod serve;
mod serving;
mod settings;
mod sources;
mod status;
mod telemetry;
mod tokens;
mod withheld;

pub use answer::ProblemBody;
pub use connections::Limits;
pub use error::ServeError;
pub use executions::ShowPlan;
pub use handles::{Addresses, ProcessHandles};
pub use own::OwnServer;
pub use paths::{api_document, metrics_document};
pub use plans::{PlanProblem, PlanProgress, PlanState};
pub use received::{body_of, query_of};
pub use rejects::RejectsTelemetry;
pub use serve::Server;
pub use serving::Api;
pub use settings::ServeSettings;
pub use status::ShowStatus;
pub use telemetry::ApiTelemetry;
pub use tokens::{Token, Tokens};

use serving::{Serving, Timeliness};
