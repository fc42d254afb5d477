//! Which accepted events are confirmed: a collector's valid signature came with them, or the audit found them equal in coderd.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::rows;
use crate::event::Payload;

/// Confirms known events of which a signed duplicate came.
pub(super) async fn confirm(tx: &mut PgConnection, duplicates: &[&rows::New<'_>], now: DateTime<Utc>) -> Result<(), sqlx::Error> {
    let (mut builds, mut claims, mut usage) = (Vec::new(), Vec::new(), Vec::new());
    for new in duplicates.iter().filter(|new| new.confirmed_at.is_some()) {
        match &new.event.payload {
            Payload::Build(build) => builds.push((new.source_id, build.build_id)),
            Payload::Claim(claim) => claims.push((new.source_id, claim.build_id)),
            Payload::Usage(event) => usage.push((new.source_id, event.id.clone())),
        }
    }
    for (query, keys) in [
        (
            "update workspace_build set confirmed_at = $3
             where (source_id, build_id) in (select * from unnest($1::smallint[], $2::uuid[])) and confirmed_at is null",
            builds,
        ),
        (
            "update prebuild_claim set confirmed_at = $3
             where (source_id, build_id) in (select * from unnest($1::smallint[], $2::uuid[])) and confirmed_at is null",
            claims,
        ),
    ] {
        if !keys.is_empty() {
            let (sources, ids): (Vec<i16>, Vec<Uuid>) = keys.into_iter().unzip();
            sqlx::query(query).bind(sources).bind(ids).bind(now).execute(&mut *tx).await?;
        }
    }
    if !usage.is_empty() {
        let (sources, ids): (Vec<i16>, Vec<String>) = usage.into_iter().unzip();
        let query = "update usage_event set confirmed_at = $3
             where (source_id, id) in (select * from unnest($1::smallint[], $2::text[])) and confirmed_at is null";
        sqlx::query(query).bind(sources).bind(ids).bind(now).execute(&mut *tx).await?;
    }
    Ok(())
}
