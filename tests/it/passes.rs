//! Passes of collectors in a real ledger.

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline::ledger::Completeness;
use uuid::Uuid;

use crate::support::ledger::ledger_at;

/// Rows that a scan of the plan read, by its index: `Index Scan using i on t (cost=… rows=1 …) (actual … rows=1 loops=1)`.
fn rows_read_by(index: &str, plan: &[String]) -> Option<u64> {
    let line = plan.iter().find(|line| line.contains(&format!(" using {index} ")))?;
    line.rsplit_once(" rows=")?.1.split([' ', '.']).next()?.parse().ok()
}

#[tokio::test]
async fn how_far_a_source_is_complete_is_found_without_reading_its_passes() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let begin = "2026-01-10T12:00:00Z".parse::<DateTime<Utc>>().unwrap();
    let source = ledger.register_source(Uuid::from_u128(1), begin, None).await.unwrap().id;
    // Two early passes that claim, and then weeks of passes that cannot. The ledger has not read what the last one found.
    sqlx::query(
        "with taken as (insert into batch (kind, recorded_at) values ('pass', now()) returning id)
         insert into collector_pass (batch_id, source_id, started_at, complete_until, runtime_complete_until, full_sweep, produced, late)
         select taken.id, $1, now(), case when n <= 2 then $2 + n * interval '1 minute' end, case when n <= 2 then $2 end, false, 0, 0
         from taken, generate_series(1, 50000) n",
    )
    .bind(source)
    .bind(begin)
    .execute(&ledger.pool)
    .await
    .unwrap();
    sqlx::raw_sql(
        "insert into collector_pass_offset (pass_id, topic, partition, next_offset)
         select max(id), 'tallyline.workspace-builds.v1', partition, 1 from collector_pass, generate_series(0, 8) partition group by partition;
         analyze collector_pass, collector_pass_offset",
    )
    .execute(&ledger.pool)
    .await
    .unwrap();
    let claimed = Completeness { complete_until: Some(begin + TimeDelta::minutes(2)), runtime_complete_until: Some(begin) };
    assert_eq!(ledger.completeness(source).await.unwrap(), claimed);
    let plan = ledger.explain_completeness(source).await.unwrap();
    let text = plan.join("\n");
    for index in ["collector_pass_with_claim", "collector_pass_with_runtime_claim"] {
        assert_eq!(rows_read_by(index, &plan), Some(1), "{text}");
    }
    assert!(!text.contains("Rows Removed by Filter"), "{text}");
    assert!(!text.contains("Seq Scan on collector_pass "), "{text}");
}
