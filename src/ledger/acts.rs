//! The audit trail: what operators did, each act in the transaction of what it changed.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;

use super::Ledger;

/// Who did what this program does by itself.
pub const OURSELVES: &str = concat!("tallyline ", env!("CARGO_PKG_VERSION"));
/// The words of `operator_act_is_known`: what can be done.
pub const ACTS: [&str; 11] =
    ["resubmit", "admit", "discard", "pause", "resume", "replay", "rebuild", "recover", "accept", "retire", "reinstate"];

/// An act to be written down.
#[derive(Clone, Debug)]
pub struct NewAct<'a> {
    /// A person's login, a token's name, or `tallyline VERSION`; never empty.
    pub actor: &'a str,
    /// One of the words of `operator_act_is_known`.
    pub act: &'static str,
    /// What it was done to: a reject's id, a plan's hash, an operation, a deployment.
    pub subject: &'a str,
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
    /// What: resubmit, admit, discard, pause, resume, replay, rebuild, recover, accept, retire or reinstate.
    pub act: String,
    /// What it was done to: a reject's id, a plan's hash, an operation, a deployment.
    pub subject: String,
    /// Why, in the actor's words; may be empty.
    pub reason: String,
    /// What more there is to say; its form depends on the act.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
    /// The ledger sequence of the act.
    pub sequence: i64,
}

/// Which acts are looked for: those that fit all that is given.
#[derive(Clone, Debug, Default)]
pub struct ActFilter<'a> {
    /// Exactly this actor.
    pub actor: Option<&'a str>,
    /// One of [`ACTS`].
    pub act: Option<&'a str>,
    /// Exactly this subject.
    pub subject: Option<&'a str>,
    /// Acted at or after.
    pub from: Option<DateTime<Utc>>,
    /// And before.
    pub to: Option<DateTime<Utc>>,
    /// With smaller ids.
    pub before: Option<i64>,
}

impl Ledger {
    /// At most `limit` acts, the latest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn acts(&self, filter: &ActFilter<'_>, limit: i64) -> Result<Vec<Act>, sqlx::Error> {
        sqlx::query_as(
            "select operator_act.id, acted_at, actor, act, subject, reason, detail, batch.sequence
             from operator_act join batch on batch.id = batch_id
             where ($1::text is null or actor = $1) and ($2::text is null or act = $2) and ($3::text is null or subject = $3)
               and ($4::timestamptz is null or acted_at >= $4) and ($5::timestamptz is null or acted_at < $5)
               and ($6::bigint is null or operator_act.id < $6)
             order by operator_act.id desc limit $7",
        )
        .bind(filter.actor)
        .bind(filter.act)
        .bind(filter.subject)
        .bind(filter.from)
        .bind(filter.to)
        .bind(filter.before)
        .bind(limit)
        .fetch_all(&self.pool)
        .await
    }

    /// Writes an act that changes nothing else in the ledger, and answers its id.
    ///
    /// # Errors
    /// The database's.
    pub async fn record_act(&self, act: &NewAct<'_>) -> Result<i64, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let id = self.act(&mut tx, act).await?;
        tx.commit().await?;
        Ok(id)
    }

    /// Writes an act as a batch of its own in this transaction, and answers its id. After a recovery, collectors that open read everything.
    pub(super) async fn act(&self, tx: &mut PgConnection, act: &NewAct<'_>) -> Result<i64, sqlx::Error> {
        let now = self.clock.now();
        if act.act == "recover" {
            sqlx::query("update collector_progress set swept_at = null").execute(&mut *tx).await?;
        }
        sqlx::query_scalar(
            "with taken as (insert into batch (kind, recorded_at) values ('operator', $1) returning id)
             insert into operator_act (batch_id, acted_at, actor, act, subject, reason, detail)
             select taken.id, $1, $2, $3, $4, $5, $6 from taken returning id",
        )
        .bind(now)
        .bind(act.actor)
        .bind(act.act)
        .bind(act.subject)
        .bind(act.reason)
        .bind(&act.detail)
        .fetch_one(tx)
        .await
    }
}
