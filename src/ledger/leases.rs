//! Leases: one holder at a time, by the database's clock, so that no machine's own clock decides.

use std::pin::pin;
use std::time::Duration;

use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Ledger, Sequence};

/// How long a process that stops waits for the ledger's answer about a lease.
const LAST_ANSWER: Duration = Duration::from_secs(2);

/// A lease that was held when this was made. It ends by itself unless renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// What is leased.
    pub name: String,
    /// Who holds it; must differ between processes.
    pub holder: String,
    /// Raised by each new holder.
    pub epoch: i64,
}

/// The leases of all collectors: each opens again, and reads everything. A pass that is being recorded is in before they are revoked.
pub(super) const ALL_COLLECTORS: &str = "collector:%";

/// The name of the lease that the collector of a deployment holds.
#[must_use]
pub fn collector_lease(deployment_id: Uuid) -> String {
    format!("collector:{deployment_id}")
}

/// Why nothing was written in a lease's name.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody else has taken it.
    #[error("the lease {0:?} is lost")]
    Lost(String),
    /// The database.
    #[error("{}", crate::cause::text(.0))]
    Database(#[from] sqlx::Error),
}

/// What a step of a lease gives: taking, renewing or giving it back. It is not broken off as the process stops, for a lease that is being
/// taken has to be known, to be given back; but then it has only 2 s more. None: the ledger did not answer, and the lease ends by itself.
pub async fn lease_step<T>(stop: &CancellationToken, step: impl Future<Output = T>) -> Option<T> {
    let mut step = pin!(step);
    tokio::select! {
        done = &mut step => Some(done),
        () = stop.cancelled() => tokio::time::timeout(LAST_ANSWER, step).await.ok(),
    }
}

impl Ledger {
    /// Takes a lease that is free, expired or already this holder's. None: somebody else holds it.
    pub async fn take_lease(&self, name: &str, holder: &str, length: Duration) -> Result<Option<Lease>, sqlx::Error> {
        let epoch: Option<i64> = sqlx::query_scalar(
            "insert into lease as held (name, holder, epoch, expires_at)
             values ($1, $2, 1, clock_timestamp() + make_interval(secs => $3))
             on conflict (name) do update set holder = excluded.holder,
                 epoch = held.epoch + case when held.holder = excluded.holder then 0 else 1 end,
                 expires_at = greatest(held.expires_at, excluded.expires_at)
             where held.holder = excluded.holder or held.expires_at <= clock_timestamp()
             returning epoch",
        )
        .bind(name)
        .bind(holder)
        .bind(length.as_secs_f64())
        .fetch_optional(&self.pool)
        .await?;
        Ok(epoch.map(|epoch| Lease { name: name.to_owned(), holder: holder.to_owned(), epoch }))
    }

    /// Holds a lease for another `length` from now. False: it is lost, and nothing may be done in its name any more. Its end never moves back.
    /// After an error whether it is still held is not known.
    pub async fn renew_lease(&self, lease: &Lease, length: Duration) -> Result<bool, sqlx::Error> {
        let renewed = sqlx::query(
            "update lease set expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => $4))
             where name = $1 and holder = $2 and epoch = $3",
        )
        .bind(&lease.name)
        .bind(&lease.holder)
        .bind(lease.epoch)
        .bind(length.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(renewed.rows_affected() == 1)
    }

    /// Gives a lease back before its end, so that the next holder need not wait. One that is lost already is left alone. The holder's name
    /// goes too: should the same process take it again, that is a new epoch.
    /// After an error the lease ends by itself.
    pub async fn release_lease(&self, lease: Lease) -> Result<(), sqlx::Error> {
        sqlx::query("update lease set holder = '', expires_at = clock_timestamp() where name = $1 and holder = $2 and epoch = $3")
            .bind(&lease.name)
            .bind(&lease.holder)
            .bind(lease.epoch)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Who holds a lease that has not ended.
    pub async fn lease_holder(&self, name: &str) -> Result<Option<String>, sqlx::Error> {
        sqlx::query_scalar("select holder from lease where name = $1 and expires_at > clock_timestamp()")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
    }

    /// The highest sequence that was ever shown in this lease's name; 0 before anything was.
    pub async fn shown_sequence(&self, name: &str) -> Result<i64, sqlx::Error> {
        let shown = sqlx::query_scalar("select shown_sequence from lease where name = $1").bind(name).fetch_optional(&self.pool).await?;
        Ok(shown.unwrap_or_default())
    }

    /// Says that a fold up to this sequence of this incarnation is about to be shown in this lease's name, and answers the highest that ever was, this one included:
    /// a fold below it must not be shown. None: the lease is another's, or the ledger
    /// is another by now. One that has ended, but that nobody else took, still is ours:
    /// the next holder finds what was raised.
    /// After an error nothing may be shown.
    pub async fn raise_shown_sequence(&self, lease: &Lease, folded: Sequence) -> Result<Option<i64>, sqlx::Error> {
        sqlx::query_scalar(
            "update lease set shown_sequence = greatest(shown_sequence, $4) where name = $1 and holder = $2 and epoch = $3
                 and $5 = (select incarnation from ledger)
             returning shown_sequence",
        )
        .bind(&lease.name)
        .bind(&lease.holder)
        .bind(lease.epoch)
        .bind(folded.number)
        .bind(folded.incarnation)
        .fetch_optional(&self.pool)
        .await
    }
}

/// Ends the leases whose name is like this: their holders have to open again. Every writer takes the one row of `ledger` last, so this comes before
/// it.
pub(super) async fn revoke_leases(tx: &mut PgConnection, like: &str) -> Result<(), sqlx::Error> {
    sqlx::query("select from lease where name like $1 order by name for update").bind(like).execute(&mut *tx).await?;
    let revoked = "update lease set holder = '', epoch = epoch + 1, expires_at = clock_timestamp() where name like $1";
    sqlx::query(revoked).bind(like).execute(tx).await?;
    Ok(())
}

/// Makes sure that the lease is this holder's until the transaction ends: who wants to take it waits. One that has ended, but that nobody
/// else took, still is.
pub(super) async fn hold(connection: &mut PgConnection, lease: &Lease) -> Result<(), LeaseError> {
    let held = sqlx::query("select from lease where name = $1 and holder = $2 and epoch = $3 for share")
        .bind(&lease.name)
        .bind(&lease.holder)
        .bind(lease.epoch)
        .fetch_optional(connection)
        .await?;
    held.map(|_| ()).ok_or_else(|| LeaseError::Lost(lease.name.clone()))
}
