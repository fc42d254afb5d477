//! Leases: one holder at a time. They use the database's clock, so that a machine's clock does not
//! decide.

use std::pin::pin;
use std::time::Duration;

use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Sequence;

/// How long a stopping process waits for the ledger's answer about a lease.
const LAST_ANSWER: Duration = Duration::from_secs(2);

/// A lease that was held when this value was made. It expires unless it is renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The name of the leased work.
    pub name: String,
    /// The holder; must differ between processes.
    pub holder: String,
    pub epoch: i64,
}

/// The pattern of the names of all collectors' leases. Revoking them makes each collector open
/// again and reread everything. A pass in flight commits first.
pub(super) const ALL_COLLECTORS: &str = "collector:%";

/// The name of the lease of a deployment's collector.
#[must_use]
pub fn collector_lease(deployment_id: Uuid) -> String {
    format!("collector:{deployment_id}")
}

/// Reasons why a write under a lease failed.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another holder has taken the lease.
    #[error("lease {0:?} is lost: another process has taken it")]
    Lost(String),
    #[error("{}", crate::cause::text(.0))]
    Database(#[from] sqlx::Error),
}

/// The result of a lease step: take, renew or release. A stop does not cancel the step, because a
/// lease being taken must be known to be released; after a stop the step has 2 s. None: the ledger
/// did not answer, and the lease expires.
pub async fn lease_step<T>(stop: &CancellationToken, step: impl Future<Output = T>) -> Option<T> {
    let mut step = pin!(step);
    tokio::select! {
        done = &mut step => Some(done),
        () = stop.cancelled() => tokio::time::timeout(LAST_ANSWER, step).await.ok(),
    }
}

/// Takes a lease that is free, expired or already this holder's. None: another holder has it.
pub async fn take(
    conn: &mut PgConnection,
    name: &str,
    holder: &str,
    length: Duration,
) -> Result<Option<Lease>, sqlx::Error> {
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
    .fetch_optional(conn)
    .await?;
    Ok(epoch.map(|epoch| Lease { name: name.to_owned(), holder: holder.to_owned(), epoch }))
}

/// Extends a lease by `length` from now; its end never moves back. False: the lease is lost, and
/// the caller must stop its work. After an error it is not known whether the lease is still held.
pub async fn renew(
    conn: &mut PgConnection,
    lease: &Lease,
    length: Duration,
) -> Result<bool, sqlx::Error> {
    let renewed = sqlx::query(
        "update lease set expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => $4))
         where name = $1 and holder = $2 and epoch = $3",
    )
    .bind(&lease.name)
    .bind(&lease.holder)
    .bind(lease.epoch)
    .bind(length.as_secs_f64())
    .execute(conn)
    .await?;
    Ok(renewed.rows_affected() == 1)
}

/// Releases a lease early, so that the next holder need not wait. A lost lease is not changed. The
/// holder's name is removed too, so that the same process gets a new epoch. After an error the
/// lease expires.
pub async fn release(conn: &mut PgConnection, lease: Lease) -> Result<(), sqlx::Error> {
    sqlx::query("update lease set holder = '', expires_at = clock_timestamp() where name = $1 and holder = $2 and epoch = $3")
        .bind(&lease.name)
        .bind(&lease.holder)
        .bind(lease.epoch)
        .execute(conn)
        .await?;
    Ok(())
}

/// The holder of a lease that has not expired.
pub async fn holder(conn: &mut PgConnection, name: &str) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select holder from lease where name = $1 and expires_at > clock_timestamp()",
    )
    .bind(name)
    .fetch_optional(conn)
    .await
}

/// The highest sequence ever shown under this lease; 0 before the first.
pub async fn shown_sequence(conn: &mut PgConnection, name: &str) -> Result<i64, sqlx::Error> {
    let shown = sqlx::query_scalar("select shown_sequence from lease where name = $1")
        .bind(name)
        .fetch_optional(conn)
        .await?;
    Ok(shown.unwrap_or_default())
}

/// Records that a fold up to this sequence of this incarnation is about to be shown under this
/// lease. Returns the highest sequence ever recorded, this one included; a fold below it must not
/// be shown. None: the lease is lost, or the ledger has another incarnation. An expired lease that
/// no other process has taken is still valid: the next holder reads the raised sequence. After an
/// error nothing may be shown.
pub async fn raise_shown_sequence(
    conn: &mut PgConnection,
    lease: &Lease,
    folded: Sequence,
) -> Result<Option<i64>, sqlx::Error> {
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
    .fetch_optional(conn)
    .await
}

/// Ends the leases whose names match `like`; their holders must open again. Every writer locks the
/// row of `ledger` last, so this runs before.
pub(super) async fn revoke_leases(tx: &mut PgConnection, like: &str) -> Result<(), sqlx::Error> {
    sqlx::query("select from lease where name like $1 order by name for update")
        .bind(like)
        .execute(&mut *tx)
        .await?;
    let revoked = "update lease set holder = '', epoch = epoch + 1, expires_at = clock_timestamp() where name like $1";
    sqlx::query(revoked).bind(like).execute(tx).await?;
    Ok(())
}

/// Keeps the lease with this holder until the transaction ends; another process that wants it
/// waits. An expired lease that no other process has taken is still valid.
pub(super) async fn hold(connection: &mut PgConnection, lease: &Lease) -> Result<(), LeaseError> {
    let held =
        sqlx::query("select from lease where name = $1 and holder = $2 and epoch = $3 for share")
            .bind(&lease.name)
            .bind(&lease.holder)
            .bind(lease.epoch)
            .fetch_optional(connection)
            .await?;
    held.map(|_| ()).ok_or_else(|| LeaseError::Lost(lease.name.clone()))
}
