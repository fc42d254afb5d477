//! The cost of a pass for coderd's database.

use std::time::Duration;

use chrono::TimeDelta;
use sqlx::PgPool;
use tallyline::coderd::{Time, UsageKey};
use tallyline_sim::coderd::SchemaVersion;
use uuid::Uuid;

use super::source_of;
use crate::support::coderd::Coderd;
use crate::support::eventually;

/// PostgreSQL's own counters of reads of a table.
pub(super) struct Reads {
    whole_table: i64,
    entries: i64,
}

impl Reads {
    /// Waits until all readers are closed: a connection adds its counts at its end.
    pub(super) async fn of(pool: &PgPool, index: &str) -> Reads {
        let readers = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'tallyline'";
        eventually(Duration::from_secs(30), "every reader is closed", async || {
            sqlx::query_scalar::<_, i64>(readers).fetch_one(pool).await.unwrap() == 0
        })
        .await;
        // A session adds its counts late. Those of the set-up end before, and one of the pool is
        // asked to.
        let mut session = pool.acquire().await.unwrap();
        let others = "select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'";
        sqlx::query(others).execute(&mut *session).await.unwrap();
        sqlx::query("select pg_stat_force_next_flush()").execute(&mut *session).await.unwrap();
        let query = "select seq_scan, idx_tup_read from pg_stat_user_tables join pg_stat_user_indexes using (relid) where indexrelname = $1";
        let (whole_table, entries) =
            sqlx::query_as(query).bind(index).fetch_one(&mut *session).await.unwrap();
        Reads { whole_table, entries }
    }

    /// The number of index entries read since. Fails if the table was also read otherwise.
    pub(super) async fn entries_since(self, pool: &PgPool, index: &str) -> i64 {
        let now = Reads::of(pool, index).await;
        assert_eq!(now.whole_table, self.whole_table, "the table was read as a whole");
        now.entries - self.entries
    }
}

#[tokio::test]
async fn the_incremental_probe_reads_only_the_index() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    sqlx::raw_sql(
        "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id)
         select gen_random_uuid(), at, at, at, at, (select id from organizations), gen_random_uuid(), 'terraform', 'file', 'workspace_build',
             '{}', case when n % 50 > 0 then md5((n % 20)::text)::uuid end, gen_random_uuid()
         from (select n, now() - n * interval '1 minute' as at from generate_series(1, 30000) n) jobs;
         analyze provisioner_jobs",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    let (pool, index) =
        (&coderd.database.pool, "provisioner_jobs_worker_id_organization_id_completed_at_idx");
    let since = coderd.now().await - TimeDelta::minutes(100);
    let after = (Time::from(since), Uuid::nil());
    let before = Reads::of(pool, index).await;
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    let keys = reader.recent_build_keys(after, 1000).await.unwrap();
    reader.close().await;
    let read = before.entries_since(pool, index).await;
    assert!(
        (99..1000).contains(&read),
        "{read} of 30000 entries for the last 100 minutes of three weeks"
    );
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    let expected: i64 =
        sqlx::query_scalar("select count(*) from provisioner_jobs where completed_at >= $1")
            .bind(since)
            .fetch_one(&coderd.database.pool)
            .await
            .unwrap();
    assert!(expected >= 99, "{expected}");
    assert_eq!(
        i64::try_from(keys.len()).unwrap(),
        expected,
        "jobs of every worker are found, and those without one"
    );
    // Pages contain every key exactly once.
    let (mut paged, mut at) = (Vec::new(), after);
    loop {
        let page = reader.recent_build_keys(at, 7).await.unwrap();
        let Some(last) = page.last() else { break };
        at = (last.completed_at, last.job_id);
        paged.extend(page);
    }
    assert_eq!(paged, keys);
}

#[tokio::test]
async fn a_page_of_recent_usage_costs_the_same_wherever_it_begins() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    // Three rows share each instant; every hundredth has just been reserved, every other hundredth
    // published.
    sqlx::raw_sql(
        "alter table usage_events disable trigger all;
         insert into usage_events (id, event_type, event_data, created_at, publish_started_at, published_at)
         select n::text, 'dc_managed_agents_v1', '{\"count\": 1}', now() - (n / 3) * interval '1 second',
             case when n % 100 < 2 then now() end, case when n % 100 = 1 then now() end
         from generate_series(1, 30000) n;
         analyze usage_events",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    let now = coderd.now().await;
    let (dated_since, since) = (now - TimeDelta::days(8), now - TimeDelta::hours(1));
    let mut keys: Vec<UsageKey> = Vec::new();
    loop {
        let page = reader.recent_usage_keys(dated_since, since, keys.last(), 1000).await.unwrap();
        let full = page.len() == 1000;
        keys.extend(page);
        if !full {
            break;
        }
    }
    assert_eq!(keys.len(), 30000, "pages leave none out");
    assert!(
        keys.windows(2)
            .all(|pair| (pair[0].created_at, &pair[0].id) < (pair[1].created_at, &pair[1].id)),
        "and meet none twice"
    );
    reader.close().await;
    let (pool, index) = (&coderd.database.pool, "idx_usage_events_select_for_publishing");
    for after in [None, Some(&keys[15_000]), Some(&keys[28_000])] {
        let before = Reads::of(pool, index).await;
        let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
        reader.recent_usage_keys(dated_since, since, after, 100).await.unwrap();
        reader.close().await;
        let read = before.entries_since(pool, index).await;
        assert!(
            (100..1000).contains(&read),
            "{read} entries read for a page of 100, with 600 marked rows"
        );
    }
}
