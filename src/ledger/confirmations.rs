//! Which accepted events are confirmed: those that the audit has seen equal in coderd join those that came with a valid signature.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::Ledger;

impl Ledger {
    /// Confirms builds that coderd has as they were accepted.
    pub async fn confirm_builds(&self, source_id: i16, ids: &[Uuid]) -> Result<(), sqlx::Error> {
        let query = "update workspace_build set confirmed_at = $3 where source_id = $1 and build_id = any($2) and confirmed_at is null";
        sqlx::query(query).bind(source_id).bind(ids).bind(self.clock.now()).execute(&self.pool).await.map(drop)
    }

    /// Confirms claims, by their build, that coderd has as they were accepted.
    pub async fn confirm_claims(&self, source_id: i16, ids: &[Uuid]) -> Result<(), sqlx::Error> {
        let query = "update prebuild_claim set confirmed_at = $3 where source_id = $1 and build_id = any($2) and confirmed_at is null";
        sqlx::query(query).bind(source_id).bind(ids).bind(self.clock.now()).execute(&self.pool).await.map(drop)
    }

    /// Confirms usage that coderd has as it was accepted.
    pub async fn confirm_usage(&self, source_id: i16, ids: &[String]) -> Result<(), sqlx::Error> {
        let query = "update usage_event set confirmed_at = $3 where source_id = $1 and id = any($2) and confirmed_at is null";
        sqlx::query(query).bind(source_id).bind(ids).bind(self.clock.now()).execute(&self.pool).await.map(drop)
    }

    /// Of these builds, whether the build and the claim that it may be are confirmed; none for a missing event.
    pub async fn confirmed_builds(&self, source_id: i16, ids: &[Uuid]) -> Result<HashMap<Uuid, [Option<bool>; 2]>, sqlx::Error> {
        let rows: Vec<(Uuid, bool, bool)> = sqlx::query_as(
            "select build_id, false, confirmed_at is not null from workspace_build where source_id = $1 and build_id = any($2)
             union all
             select build_id, true, confirmed_at is not null from prebuild_claim where source_id = $1 and build_id = any($2)",
        )
        .bind(source_id)
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        let mut confirmed: HashMap<Uuid, [Option<bool>; 2]> = HashMap::new();
        for (id, is_claim, is_confirmed) in rows {
            confirmed.entry(id).or_default()[usize::from(is_claim)] = Some(is_confirmed);
        }
        Ok(confirmed)
    }

    /// Those of these usage events that are confirmed.
    pub async fn confirmed_usage(&self, source_id: i16, ids: &[String]) -> Result<HashSet<String>, sqlx::Error> {
        let query = "select id from usage_event where source_id = $1 and id = any($2) and confirmed_at is not null";
        let rows: Vec<String> = sqlx::query_scalar(query).bind(source_id).bind(ids).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().collect())
    }
}
