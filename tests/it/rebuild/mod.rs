//! Rebuilds and rehearsals: the difference is shown before it takes effect, and a rehearsal leaves
//! no trace.

mod rehearsal;
mod running;

use std::time::Duration;

use serde_json::{Value, json};
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::{Chain, Ledger, LicenseChange, LicenseState, licenses, sources};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline_sim::coderd::Signer;
use tempfile::TempDir;

use crate::support::Database;
use crate::support::ledger::{
    DEPLOYMENT, arrival, lease_partition, ledger, noon, partition, record_batch, take_lease,
};
use crate::support::process::{Ended, run_tallyline};
use crate::support::tables::tables;

const SOON: Duration = Duration::from_secs(30);
/// The key pair of the pipeline's licenses.
const SECRET: [u8; 32] = [7; 32];

struct Site {
    ledger: Ledger,
    file: String,
    folder: TempDir,
    _database: Database,
}

impl Site {
    /// A deployment with the licenses and the usage of [`licenses`] and [`agents`].
    async fn new() -> Site {
        let (database, ledger) = ledger().await;
        Log::postgres(ledger.pool.clone(), PostgresLogSettings::default())
            .create_topics(1)
            .await
            .unwrap();
        let source = ledger
            .run(async |conn| {
                sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
            })
            .await
            .unwrap();
        let lease = take_lease(&ledger, "collector", "test", SOON).await.unwrap().unwrap();
        ledger
            .run(async |conn| {
                licenses::record(conn, &lease, source.id, &licenses(), ledger.clock.now()).await
            })
            .await
            .unwrap();
        record(&ledger, &agents()).await;
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("pipeline.toml");
        let pem = Signer::new(SECRET, "k1").unwrap().public().public_key_pem.clone();
        let lines = format!(
            "roles = ['consume']\nledger.url = '{}'\nlicense.public_keys.'k1' = '''{pem}'''\n",
            database.url
        );
        std::fs::write(&path, lines).unwrap();
        Site { ledger, file: path.to_str().unwrap().to_owned(), folder, _database: database }
    }

    async fn run(&self, words: &str) -> Ended {
        let words: Vec<&str> = words.split_whitespace().collect();
        run_tallyline(&[&words[..], &["--pipeline", &self.file, "--output", "json"]].concat(), &[])
            .await
    }

    /// Runs a command that must exit with this code and change nothing.
    async fn rehearse(&self, words: &str, exit: i32) -> Ended {
        let before = tables(&self.ledger.pool).await;
        let ended = self.run(words).await;
        assert_eq!(ended.status.code(), Some(exit), "{ended:?}");
        assert!(tables(&self.ledger.pool).await == before, "{words}: the ledger was touched");
        ended
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

async fn record(ledger: &Ledger, events: &[Event]) {
    let claim = lease_partition(ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let arrivals: Vec<_> = (claim.next_offset..)
        .zip(events)
        .map(|(offset, event)| arrival(offset, event.clone()))
        .collect();
    let next_offset = claim.next_offset + i64::try_from(events.len()).unwrap();
    record_batch(ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
}

fn licenses() -> Vec<LicenseChange> {
    let license = |id: u8,
                   feature_set: &str,
                   issued_at: &str,
                   not_before: &str,
                   ends: [&str; 2],
                   features: Value| LicenseChange {
        license_id: id.into(),
        jwt_sha256: [id; 32],
        uploaded_at: None,
        state: LicenseState::Verified(json!({
            "issued_at": issued_at, "not_before": not_before, "license_expires": ends[0], "expires_at": ends[1], "token_id": format!("token-{id}"),
            "account_type": "salesforce", "account_id": "1", "feature_set": feature_set, "features": features
        })),
    };
    let limits = |soft: i64, hard: i64| json!({"managed_agent_limit_soft": soft, "managed_agent_limit_hard": hard});
    let (years, months) = (
        ["2026-07-10T00:00:00Z", "2026-08-10T00:00:00Z"],
        ["2025-11-01T00:00:00Z", "2025-12-01T00:00:00Z"],
    );
    vec![
        license(
            1,
            "enterprise",
            "2025-07-05T00:00:00Z",
            "2025-07-10T09:30:00Z",
            years,
            limits(40, 60),
        ),
        license(
            2,
            "premium",
            "2025-07-01T00:00:00Z",
            "2025-07-01T00:00:00Z",
            years,
            json!({"user_limit": 10}),
        ),
        license(
            3,
            "enterprise",
            "2025-07-20T00:00:00Z",
            "2025-07-20T06:00:00Z",
            months,
            limits(50, 45),
        ),
    ]
}

/// By hand: license 1's window has 8 + 1 + 48 = 57, license 3's 48. From 2025-07-01 on there are 7
/// + 16 + 8 + 1 + 48 = 80.
fn agents() -> Vec<Event> {
    let agents = |id: &str, count: u64, at: &str| {
        let (quantity, created_at) = (UsageQuantity::ManagedAgents(count), at.parse().unwrap());
        Event {
            deployment: DEPLOYMENT,
            payload: Payload::Usage(Usage {
                id: id.into(),
                quantity,
                created_at,
                marks: PublishMarks::default(),
            }),
        }
    };
    vec![
        agents("before any keys", 7, "2025-07-05T00:00:00Z"),
        agents("just before license 1", 16, "2025-07-10T09:29:59.999999Z"),
        agents("at the start of license 1", 8, "2025-07-10T09:30:00Z"),
        agents("just before license 3", 1, "2025-07-20T05:59:59.999999Z"),
        agents("within all", 48, "2025-07-25T00:00:00Z"),
    ]
}

fn json_of(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}
