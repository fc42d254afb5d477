//! The audit trail: what operators did, each act in the transaction of what it changed.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

use super::{Ledger, Sequence};
use crate::words::words;

/// Who did what this program does by itself.
pub const OURSELVES: &str = concat!("tallyline ", env!("CARGO_PKG_VERSION"));

words! {
    /// What can be done.
    ActKind {
        /// A reject is passed through the log again.
        Resubmit = "resubmit",
        /// A held record is passed through the log, for its type or deployment is known by now.
        Admit = "admit",
        /// A reject is given up.
        Discard = "discard",
        /// An operation is stopped for now.
        Pause = "pause",
        /// A pause ends.
        Resume = "resume",
        /// A range of the log is read again.
        Replay = "replay",
        /// A stage is folded again from the first batch.
        Rebuild = "rebuild",
        /// What was lost with the log, the ledger or coderd's database is recovered.
        Recover = "recover",
        /// A source's coderd is accepted as the one that it is bound to.
        Accept = "accept",
        /// A source goes out of use.
        Retire = "retire",
        /// A retired source is in use again.
        Reinstate = "reinstate",
    }
}

/// What an act was done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    /// The reject of this number.
    Reject(i64),
    /// A plan's hash, an operation, a stage, a deployment.
    Named(&'a str),
}

/// An act to be written down.
#[derive(Clone, Debug)]
pub struct NewAct<'a> {
    /// A person's login, a token's name, or `tallyline VERSION`; never empty.
    pub actor: &'a str,
    /// What is done.
    pub act: ActKind,
    /// What it is done to.
    pub subject: Subject<'a>,
    /// Why, in the actor's words.
    pub reason: &'a str,
    /// What more there is to say.
    pub detail: serde_json::Value,
}

/// An act as it was written down.
#[derive(Clone, Debug, PartialEq, FromRow, Serialize, Deserialize, ToSchema)]
pub struct Act {
    /// Later acts have greater ones.
    pub id: i64,
    /// When.
    pub acted_at: DateTime<Utc>,
    /// Who: a person's login, a token's name, or `tallyline VERSION`.
    pub actor: String,
    /// What.
    pub act: ActKind,
    /// What it was done to: a reject's id, a plan's hash, an operation, a deployment.
    pub subject: String,
    /// Why, in the actor's words; may be empty.
    pub reason: String,
    /// What more there is to say; its form depends on the act.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
    /// The ledger sequence of the act.
    pub sequence: Sequence,
}

/// Which acts are shown: those that fit all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListActs {
    /// Only this actor's: a person's login, a token's name, or `tallyline VERSION`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// Only these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub act: Option<ActKind>,
    /// Only what was done to this: a reject's id, a plan's hash, an operation, a deployment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Only at or after this instant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<DateTime<Utc>>,
    /// Only before this instant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<DateTime<Utc>>,
    /// Only with smaller ids: `next_before` of the page before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
    /// Most acts of the page, 1 to 1000; 100 where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u16>,
}

impl Ledger {
    /// At most `limit` of the acts, the latest first. The limit of the request does not count here.
    pub async fn acts(&self, asked: &ListActs, limit: i64) -> Result<Vec<Act>, sqlx::Error> {
        sqlx::query_as(
            "select operator_act.id, acted_at, actor, act, coalesce(subject, reject_id::text) as subject, reason, detail, named_sequence(batch.sequence) as sequence
             from operator_act join batch on batch.id = batch_id
             where ($1::text is null or actor = $1) and ($2::text is null or act = $2) and ($3::text is null or coalesce(subject, reject_id::text) = $3)
               and ($4::timestamptz is null or acted_at >= $4) and ($5::timestamptz is null or acted_at < $5)
               and ($6::bigint is null or operator_act.id < $6)
             order by operator_act.id desc limit $7",
        )
        .bind(&asked.actor)
        .bind(asked.act)
        .bind(&asked.subject)
        .bind(asked.from)
        .bind(asked.to)
        .bind(asked.before)
        .bind(limit)
        .fetch_all(&self.pool)
        .await
    }

    /// Writes an act as a batch of its own in this transaction, and answers its id. After a recovery, collectors that open read everything.
    pub(super) async fn act(&self, tx: &mut PgConnection, act: &NewAct<'_>) -> Result<i64, sqlx::Error> {
        let now = self.clock.now();
        if act.act == ActKind::Recover {
            sqlx::query("update collector_progress set swept_at = null").execute(&mut *tx).await?;
        }
        let (subject, reject_id) = match act.subject {
            Subject::Named(subject) => (Some(subject), None),
            Subject::Reject(id) => (None, Some(id)),
        };
        sqlx::query_scalar(
            "with taken as (insert into batch (kind, recorded_at) values ('operator', $1) returning id)
             insert into operator_act (batch_id, acted_at, actor, act, subject, reject_id, reason, detail)
             select taken.id, $1, $2, $3, $4, $5, $6, $7 from taken returning id",
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
}
