//! What a proof says.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::ledger::{BatchKind, ExportLife, PublicationLife, RefusalLife, Sequence};

/// The whole life of one event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Proof {
    /// Its id.
    pub event_id: String,
    /// Its deployment; none for a record whose headers name none.
    pub deployment_id: Option<Uuid>,
    /// The ledger's last sequence when it was read.
    pub as_of_sequence: Sequence,
    /// coderd's row as it is now.
    pub source: SourceProof,
    /// The accepted event; none: there is none under this id.
    pub accepted: Option<AcceptedProof>,
    /// Records under this id that were refused or held. Sightings that told the same as the accepted event are counted with their batches, and
    /// not kept one by one.
    pub refusals: Vec<RefusalLife>,
}

/// coderd's own row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SourceProof {
    /// How it compares.
    pub state: SourceState,
    /// What there is to say.
    pub detail: String,
    /// coderd's own mark of usage: when it was published, or refused for ever.
    pub published_at: Option<DateTime<Utc>>,
}

/// How coderd's row compares with the accepted event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// It is there, and its digest is the same.
    Same,
    /// It is there, and its digest is another.
    Changed,
    /// It is not there.
    Gone,
    /// It is there, and nothing is accepted under its id.
    NotAccepted,
    /// It is there, and this version cannot read it.
    Unreadable,
    /// coderd was not, or could not be, asked.
    NotAsked,
}

/// An accepted event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AcceptedProof {
    /// The event as it was accepted: a CloudEvent in structured form.
    #[schema(value_type = Object)]
    pub event: serde_json::Value,
    /// SHA-256 of what coderd never rewrites, as it was accepted, in hexadecimal.
    pub digest: String,
    /// Whether the row still gives that digest.
    pub digest_holds: bool,
    /// Where its record stood.
    pub log: LogProof,
    /// What accepted it.
    pub batch: BatchProof,
    /// Where managed agents count; empty for other events.
    pub license_windows: Vec<LicenseWindow>,
    /// The series that it fed.
    pub metrics: Vec<SeriesProof>,
    /// The families that it did not feed, and why.
    pub not_in_metrics: Vec<NoSeries>,
    /// What became of it on its way to the vendor; only usage has one.
    pub publication: Option<PublicationLife>,
    /// The files for finance that hold it; only usage is exported.
    pub exports: Vec<ExportLife>,
}

/// A place in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogProof {
    /// The topic's name, without any prefix.
    pub topic: String,
    /// The partition; none where the batch is not there.
    pub partition: Option<i32>,
    /// Which life of the partition.
    pub generation: Option<i32>,
    /// The offset.
    pub offset: i64,
    /// What stands there now.
    pub state: LogState,
    /// What there is to say.
    pub detail: String,
}

/// What stands at the event's place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogState {
    /// The record, and it gives the same digest.
    Same,
    /// Another record, or one with another digest.
    Other,
    /// Nothing any more.
    Gone,
    /// The log could not be asked.
    NotAsked,
}

/// The batch that accepted an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BatchProof {
    /// Its id.
    pub id: i64,
    /// `log` or `replay`; none where the batch is not there.
    pub kind: Option<BatchKind>,
    /// The claim of the partition under which it was written; none for a replay.
    pub epoch: Option<i64>,
    /// Its place in the ledger's order.
    pub sequence: Option<Sequence>,
    /// When it was recorded.
    pub recorded_at: Option<DateTime<Utc>>,
}

/// The usage period of a license that is in coderd, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LicenseWindow {
    /// coderd's own id of the license.
    pub license_id: i32,
    /// The period's start, included.
    pub start: DateTime<Utc>,
    /// The period's end, not included.
    pub end: DateTime<Utc>,
    /// Whether the event lies in it.
    pub counts: bool,
    /// How many managed agents it adds.
    pub agents: i64,
    /// Whether this is the license by which the deployment is judged now.
    pub in_force: bool,
    /// When it was seen that coderd has it no more; none: coderd has it.
    pub gone_at: Option<DateTime<Utc>>,
}

/// What the event added to a series.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SeriesProof {
    /// The family's name.
    pub family: String,
    /// The series' labels, in the family's order: name and value.
    pub labels: Vec<Label>,
    /// What a histogram observed, in seconds; none: a counter rose by 1.
    pub observed_seconds: Option<f64>,
}

/// A label of a series.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Label {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A family that the event did not feed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NoSeries {
    /// The family's name.
    pub family: String,
    /// Why not.
    pub why: String,
}
