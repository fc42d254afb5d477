//! Content of an explanation.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::ledger::{
    BatchKind, CorrectionHistory, ExportHistory, PublicationHistory, RefusalHistory, Sequence,
};

/// All facts about one event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// Id of the event.
    pub event_id: String,
    /// Deployment of the event; absent if the record's headers name none.
    pub deployment_id: Option<Uuid>,
    /// Last sequence of the ledger when the explanation was made.
    pub as_of_sequence: Sequence,
    /// coderd's current row.
    pub source: ExplainedSource,
    /// The accepted event; absent if no event with this id was accepted.
    pub accepted: Option<ExplainedEvent>,
    /// Records with this id that were refused or held. Duplicates of the accepted event are not
    /// listed; each batch only counts them.
    pub refusals: Vec<RefusalHistory>,
}

/// coderd's row of the event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedSource {
    /// How the row compares with the accepted event.
    pub state: SourceState,
    /// Explanation of the state.
    pub detail: String,
    /// coderd's publish mark of a usage event: when it was published or finally refused.
    pub published_at: Option<DateTime<Utc>>,
}

/// How coderd's row compares with the accepted event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// The row exists and has the same digest.
    Same,
    /// The row exists and has another digest.
    Changed,
    /// The row does not exist.
    Gone,
    /// The row exists, but no event with its id was accepted.
    NotAccepted,
    /// The row exists, but this version cannot read it.
    Unreadable,
    /// coderd was not queried or did not answer.
    NotAsked,
}

/// An accepted event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedEvent {
    /// The accepted event: a CloudEvent in structured form.
    #[schema(value_type = Object)]
    pub event: serde_json::Value,
    /// SHA-256 of the fields that coderd never rewrites, computed when the event was accepted; in
    /// hexadecimal.
    pub digest: String,
    /// Whether the ledger's row still has this digest.
    pub digest_holds: bool,
    /// Place of the event's record in the log.
    pub log: ExplainedPlace,
    /// Batch that accepted the event.
    pub batch: ExplainedBatch,
    /// Corrections of the event by operators, in order. With any, `license_windows` and the state of
    /// coderd's row are those of the newest content, and the metrics those of the content at their
    /// newest rebuild.
    pub corrections: Vec<CorrectionHistory>,
    /// License windows of managed agents; empty for other events.
    pub license_windows: Vec<LicenseWindow>,
    /// Series that the event changed.
    pub metrics: Vec<ExplainedSeries>,
    /// Families that the event did not change, with reasons.
    pub not_in_metrics: Vec<NoSeries>,
    /// Publication to the vendor; only for usage.
    pub publication: Option<PublicationHistory>,
    /// Exports that contain the event; only for usage.
    pub exports: Vec<ExportHistory>,
}

/// A place in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedPlace {
    /// Name of the topic, without prefix.
    pub topic: String,
    /// Number of the partition; absent if the ledger does not have the batch.
    pub partition: Option<i32>,
    /// Generation of the partition.
    pub generation: Option<i32>,
    /// Offset of the record.
    pub offset: i64,
    /// Content of this place now.
    pub state: LogState,
    /// Explanation of the state.
    pub detail: String,
}

/// Content of the event's place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogState {
    /// A record with the same digest.
    Same,
    /// Another record, or one with another digest.
    Other,
    /// No record any more.
    Gone,
    /// The log could not be queried.
    NotAsked,
}

/// The batch that accepted an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedBatch {
    /// Id of the batch.
    pub id: i64,
    /// `log` or `replay`; absent if the ledger does not have the batch.
    pub kind: Option<BatchKind>,
    /// Epoch of the partition lease under which the batch was written; absent for a replay.
    pub epoch: Option<i64>,
    /// Sequence of the batch.
    pub sequence: Option<Sequence>,
    /// When the batch was recorded.
    pub recorded_at: Option<DateTime<Utc>>,
}

/// Usage period of a license that coderd has or had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LicenseWindow {
    /// coderd's own id of the license.
    pub license_id: i32,
    /// Start of the period, included.
    pub start: DateTime<Utc>,
    /// End of the period, not included.
    pub end: DateTime<Utc>,
    /// Whether the event lies in the period.
    pub counts: bool,
    /// Managed agents that the event adds.
    pub agents: i64,
    /// Whether the deployment's entitlement now depends on this license.
    pub in_force: bool,
    /// When Tallyline saw that coderd no longer has the license; absent if coderd has it.
    pub gone_at: Option<DateTime<Utc>>,
}

/// Change of a series by the event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedSeries {
    /// Name of the family.
    pub family: String,
    /// Labels of the series, in the order of the family.
    pub labels: Vec<Label>,
    /// Seconds that a histogram observed; absent for a counter, which increased by 1.
    pub observed_seconds: Option<f64>,
}

/// A label of a series.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Label {
    /// Name of the label.
    pub name: String,
    /// Value of the label.
    pub value: String,
}

/// A family that the event did not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NoSeries {
    /// Name of the family.
    pub family: String,
    /// Reason.
    pub why: String,
}
