//! Licenses that appear in and disappear from coderd: claims and a hash, never the token.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::Connection as _;
use sqlx::FromRow;
use sqlx::PgConnection;

use super::leases::hold;
use super::{Lease, LeaseError};

/// A license appeared, disappeared, or has another verification result.
#[derive(Clone, Debug, PartialEq)]
pub struct LicenseChange {
    pub license_id: i32,
    pub jwt_sha256: [u8; 32],
    /// When the license was uploaded to coderd.
    pub uploaded_at: Option<DateTime<Utc>>,
    /// The state of the license from now on.
    pub state: LicenseState,
}

#[derive(Clone, Debug, PartialEq)]
pub enum LicenseState {
    /// The license is in coderd, and its token is valid.
    Verified(Value),
    /// The license is in coderd, and its token is not valid, with the reason.
    Refused(String),
    /// coderd no longer has the license.
    Gone,
}

/// A license with a valid token, and its time in coderd.
#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct LicenseHistory {
    /// coderd's own id; the last one if it changed.
    pub license_id: i32,
    pub jwt_sha256: [u8; 32],
    pub claims: Value,
    /// When the ledger recorded that coderd no longer has it; none: coderd has it.
    pub gone_at: Option<DateTime<Utc>>,
}

/// Records changes in one batch; without changes it writes nothing. Only the holder of the
/// collector's lease may.
///
/// # Errors
/// [`LeaseError`]; nothing is recorded.
pub async fn record(
    conn: &mut PgConnection,
    lease: &Lease,
    source_id: i16,
    changes: &[LicenseChange],
    now: DateTime<Utc>,
) -> Result<(), LeaseError> {
    if changes.is_empty() {
        return Ok(());
    }
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    let batch_id: i64 = sqlx::query_scalar(
        "insert into batch (kind, recorded_at) values ('licenses', $1) returning id",
    )
    .bind(now)
    .fetch_one(&mut *tx)
    .await?;
    for change in changes {
        let (present, claims, refusal) = match &change.state {
            LicenseState::Verified(claims) => (true, Some(claims), None),
            LicenseState::Refused(refusal) => (true, None, Some(refusal)),
            LicenseState::Gone => (false, None, None),
        };
        sqlx::query(
            "insert into license (batch_id, source_id, license_id, jwt_sha256, present, uploaded_at, claims, refusal)
             values ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(batch_id)
        .bind(source_id)
        .bind(change.license_id)
        .bind(change.jwt_sha256.as_slice())
        .bind(present)
        .bind(change.uploaded_at)
        .bind(claims)
        .bind(refusal)
        .execute(&mut *tx)
        .await?;
    }
    Ok(tx.commit().await?)
}

/// The licenses that coderd has, as far as the ledger knows, by coderd's id.
pub async fn present(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Vec<LicenseChange>, sqlx::Error> {
    // The order is that of sequences, because batch ids do not follow the order of commits.
    type Row = (i32, [u8; 32], Option<DateTime<Utc>>, Option<Value>, Option<String>);
    let rows: Vec<Row> = sqlx::query_as(
        "select license_id, jwt_sha256, uploaded_at, claims, refusal
         from (
             select distinct on (license.jwt_sha256) license.*
             from license join batch on batch.id = license.batch_id
             where license.source_id = $1 order by license.jwt_sha256, batch.sequence desc
         ) latest
         where present order by license_id, jwt_sha256",
    )
    .bind(source_id)
    .fetch_all(conn)
    .await?;
    let change = |(license_id, jwt_sha256, uploaded_at, claims, refusal): Row| {
        let state = claims.map_or_else(
            || LicenseState::Refused(refusal.unwrap_or_default()),
            LicenseState::Verified,
        );
        LicenseChange { license_id, jwt_sha256, uploaded_at, state }
    };
    Ok(rows.into_iter().map(change).collect())
}

/// The licenses that coderd ever had, as far as the ledger knows, by coderd's id. Licenses without
/// a valid token are left out.
pub async fn all(
    conn: &mut PgConnection,
    source_id: i16,
) -> Result<Vec<LicenseHistory>, sqlx::Error> {
    // The row of a license that is gone has no claims.
    sqlx::query_as(
        "select latest.license_id, latest.jwt_sha256, verified.claims,
             case when not latest.present then latest.recorded_at end as gone_at
         from (
             select distinct on (license.jwt_sha256) license.*, batch.recorded_at
             from license join batch on batch.id = license.batch_id
             where license.source_id = $1 order by license.jwt_sha256, batch.sequence desc
         ) latest
         cross join lateral (
             select license.claims from license join batch on batch.id = license.batch_id
             where license.source_id = $1 and license.jwt_sha256 = latest.jwt_sha256 and license.claims is not null
             order by batch.sequence desc limit 1
         ) verified
         where latest.refusal is null order by latest.license_id, latest.jwt_sha256",
    )
    .bind(source_id)
    .fetch_all(conn)
    .await
}
