//! The rejects desk: what is refused can be seen, mended, passed through the log again or given up, and the books say so.

use std::collections::BTreeMap;

use chrono::TimeDelta;
use tallyline::event::Topic;
use tallyline::ledger::{Chain, OpenRejects, Verdict};

use crate::support::ledger::{ledger, noon, partition, refused};

#[tokio::test]
async fn open_rejects_are_counted_by_verdict_and_cause() {
    let (_database, ledger) = ledger().await;
    assert_eq!(ledger.open_rejects().await.unwrap(), []);
    let claim = ledger.claim(partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let arrivals = [refused(0, Verdict::Rejected), refused(1, Verdict::Held), refused(2, Verdict::Rejected), refused(3, Verdict::Held)];
    ledger.record(&Chain::Live(claim), &arrivals, 4).await.unwrap();
    for (offset, units, event_type, earlier) in [
        (0, None, "dc_managed_agents_v1", 0),
        (1, Some("7"), "dc_gpu_hours_v1", 60),
        (2, Some("18446744073709551615"), "dc_managed_agents_v1", 30),
        (3, Some("5"), "hb_ai_seats_v1", 0),
    ] {
        sqlx::query("update reject set units = $2::numeric, event_type = $3, recorded_at = recorded_at - $4 where log_offset = $1")
            .bind(i64::from(offset))
            .bind(units)
            .bind(event_type)
            .bind(TimeDelta::seconds(earlier))
            .execute(&ledger.pool)
            .await
            .unwrap();
    }
    let open = |verdict: &str, units: &[(&str, u64)], earlier| OpenRejects {
        verdict: verdict.to_owned(),
        cause: "json".to_owned(),
        records: 2,
        units: units.iter().map(|(unit, number)| ((*unit).to_owned(), *number)).collect::<BTreeMap<_, _>>(),
        oldest: noon() - TimeDelta::seconds(earlier),
    };
    let expected = [open("held", &[("seats", 5), ("unknown", 7)], 60), open("rejected", &[("agents", u64::MAX)], 30)];
    assert_eq!(ledger.open_rejects().await.unwrap(), expected);
}
