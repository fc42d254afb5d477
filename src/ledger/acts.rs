//! The audit log: operators' acts. Each act is written in the transaction of its change.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

use super::Sequence;
use crate::words::words;

/// The actor of acts that this program does by itself.
pub const PROGRAM: &str = concat!("tallyline ", env!("CARGO_PKG_VERSION"));

words! {
    /// The kinds of acts.
    ActKind {
        /// A reject is appended to the log again.
        Resubmit = "resubmit",
        /// A held record is appended to the log, because its type or deployment is known now.
        Admit = "admit",
        /// A reject is abandoned.
        Discard = "discard",
        /// An operation is paused.
        Pause = "pause",
        Resume = "resume",
        /// A range of the log is reread.
        Replay = "replay",
        /// A stage is folded again from the first batch.
        Rebuild = "rebuild",
        /// Losses of the log, the ledger or coderd's database are recovered.
        Recover = "recover",
        /// A coderd is accepted as the one that a source is bound to.
        Accept = "accept",
        Retire = "retire",
        /// A retired source is used again.
        Reinstate = "reinstate",
        /// Accepted events are set to coderd's rows.
        Correct = "correct",
        /// Rows were removed under the settings of retention.
        Prune = "prune",
        /// Records of the log need a signature from then on.
        Sign = "sign",
    }
}

/// The target of an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    Reject(i64),
    /// A plan's hash, an operation, a stage or a deployment.
    Named(&'a str),
}

/// An act to write.
#[derive(Clone, Debug)]
pub struct NewAct<'a> {
    /// A person's login, a token's name, or `tallyline VERSION`; never empty.
    pub actor: &'a str,
    pub act: ActKind,
    pub subject: Subject<'a>,
    /// Why, in the actor's words.
    pub reason: &'a str,
    /// More facts; the form depends on the act.
    pub detail: serde_json::Value,
}

/// An act in the audit log.
#[derive(Clone, Debug, PartialEq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct Act {
    /// The act's id; later acts have greater ids.
    pub id: i64,
    /// When the act was done.
    pub acted_at: DateTime<Utc>,
    /// The actor: a person's login, a token's name, or `tallyline VERSION`.
    pub actor: String,
    /// The kind of act.
    pub act: ActKind,
    /// The target: a reject's id, a plan's hash, an operation, a stage, a deployment, or `retention`.
    pub subject: String,
    /// The reason, in the actor's words; may be empty.
    pub reason: String,
    /// More facts; the form depends on the act.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
    /// The ledger sequence of the act.
    pub sequence: Sequence,
}

/// Filters for acts; all given filters must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActFilter {
    pub actor: Option<String>,
    pub act: Option<ActKind>,
    pub subject: Option<String>,
    /// Included.
    pub from: Option<DateTime<Utc>>,
    /// Not included.
    pub to: Option<DateTime<Utc>>,
    /// Only acts with smaller ids.
    pub before: Option<i64>,
}

/// At most `limit` of the acts, latest first.
pub async fn list(
    conn: &mut PgConnection,
    filter: &ActFilter,
    limit: i64,
) -> Result<Vec<Act>, sqlx::Error> {
    sqlx::query_as(
        "select operator_act.id, acted_at, actor, act, coalesce(subject, reject_id::text) as subject, reason, detail, named_sequence(batch.sequence) as sequence
         from operator_act join batch on batch.id = batch_id
         where ($1::text is null or actor = $1) and ($2::text is null or act = $2) and ($3::text is null or coalesce(subject, reject_id::text) = $3)
           and ($4::timestamptz is null or acted_at >= $4) and ($5::timestamptz is null or acted_at < $5)
           and ($6::bigint is null or operator_act.id < $6)
         order by operator_act.id desc limit $7",
    )
    .bind(&filter.actor)
    .bind(filter.act)
    .bind(&filter.subject)
    .bind(filter.from)
    .bind(filter.to)
    .bind(filter.before)
    .bind(limit)
    .fetch_all(conn)
    .await
}

/// Writes an act as a batch of its own in this transaction and returns its id. After `recover`,
/// collectors that open reread everything.
pub(super) async fn insert(
    tx: &mut PgConnection,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<i64, sqlx::Error> {
    if act.act == ActKind::Recover {
        sqlx::query("update collector_progress set swept_at = null").execute(&mut *tx).await?;
    }
    let (subject, reject_id) = match act.subject {
        Subject::Named(subject) => (Some(subject), None),
        Subject::Reject(id) => (None, Some(id)),
    };
    sqlx::query_scalar(
        "with added as (insert into batch (kind, recorded_at) values ('operator', $1) returning id)
         insert into operator_act (batch_id, acted_at, actor, act, subject, reject_id, reason, detail)
         select added.id, $1, $2, $3, $4, $5, $6, $7 from added returning id",
    )
    .bind(now)
    .bind(act.actor)
    .bind(act.act)
    .bind(subject)
    .bind(reject_id)
    .bind(act.reason)
    .bind(&act.detail)
    .fetch_one(tx)
    .await
}
