//! The audit trail: what operators did, each act in the transaction of what it changed.

use sqlx::PgConnection;

use super::Ledger;

/// Who did what this program does by itself.
pub const OURSELVES: &str = concat!("tallyline ", env!("CARGO_PKG_VERSION"));

/// An act to be written down.
#[derive(Clone, Debug)]
pub struct NewAct<'a> {
    /// A person's login, a token's name, or `tallyline VERSION`; never empty.
    pub actor: &'a str,
    /// One of the words of `operator_act_is_known`.
    pub act: &'static str,
    /// What it was done to: a reject's id, a plan's hash, an operation.
    pub subject: &'a str,
    /// Why, in the actor's words.
    pub reason: &'a str,
    /// What more there is to say.
    pub detail: serde_json::Value,
}

impl Ledger {
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

    /// Writes an act as a batch of its own in this transaction, and answers its id.
    pub(super) async fn act(&self, tx: &mut PgConnection, act: &NewAct<'_>) -> Result<i64, sqlx::Error> {
        let now = self.clock.now();
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
