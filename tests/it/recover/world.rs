//! A small deployment: a simulated coderd and vendor, a log, a ledger, and processes with one role
//! each.

use std::time::Duration;
use tallyline::ledger::{books, sources};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value as Json;
use tallyline::clock::Clock;
use tallyline_sim::coderd::truth::Class;
use tallyline_sim::coderd::{Config, SchemaVersion, Simulation};
use tallyline_sim::tallyman::{Switches, Tallyman};
use tokio_util::sync::CancellationToken;

use crate::journey::simulated::{pipeline, vendor};
use crate::journey::site::{Backend, Site};
use crate::journey::story::{PACE, instant};
use crate::support::process::{Ended, Process};
use crate::support::{self, Database, Kafka, eventually};

pub const SOON: Duration = Duration::from_secs(60);

pub struct World {
    pub site: Site,
    pub coderd: Database,
    pub simulation: Simulation,
    pub tallyman: Tallyman,
}

impl World {
    /// Writes half of the history, without Tallyline.
    pub async fn begin(backend: Backend) -> World {
        World::begin_with(backend, "").await
    }

    /// Like [`World::begin`], with keys: collectors sign, and consumers verify.
    pub async fn begin_with_keys(backend: Backend) -> World {
        World::begin_with(backend, "log.signing_key = '2026'\nlog.verification_keys.'2026' = '0123456789abcdef0123456789abcdef'\n").await
    }

    async fn begin_with(backend: Backend, more: &str) -> World {
        let kafka = (backend == Backend::Kafka).then(support::kafka);
        World::on(support::ledger::migrated().await, kafka, more).await
    }

    /// On the test's own servers, with more lines of the pipeline file.
    pub async fn on(database: Database, kafka: Option<Kafka>, more: &str) -> World {
        let coderd = support::database().await;
        let end = Clock::system().now() - TimeDelta::minutes(4);
        let start = end - TimeDelta::days(25);
        let config = Config {
            coderd_publishes_until: Some(instant(start, end, 0.2)),
            ..Config::history(7, SchemaVersion::Sep2026, start, end, 600)
        };
        let mut simulation = Simulation::start(config, &coderd.url).await.unwrap();
        simulation.advance_to(instant(start, end, 0.5)).await.unwrap();
        simulation.commit_held().await.unwrap();
        let tallyman = vendor(&simulation, Switches::default(), &CancellationToken::new()).await;
        let site = Site::on(
            database,
            kafka,
            &(pipeline(&coderd, &simulation, &tallyman, start, PACE) + more),
        )
        .await;
        World { site, coderd, simulation, tallyman }
    }

    /// A collector that lives at the end of the first half, so that it looks for later rows.
    pub fn collect(&self) -> Process {
        let lives_at = self.at(0.5) - TimeDelta::minutes(10);
        let offset = (lives_at - Clock::system().now()).num_seconds().to_string();
        self.site.start("collect", &["--clock-offset", &offset])
    }

    pub fn at(&self, part: f64) -> DateTime<Utc> {
        let config = self.simulation.config();
        instant(config.start, config.end, part)
    }

    /// coderd goes on to this part of its history and commits everything.
    pub async fn goes_on_to(&mut self, part: f64) {
        let until = self.at(part);
        self.simulation.advance_to(until).await.unwrap();
        self.simulation.commit_held().await.unwrap();
    }

    pub async fn source_id(&self) -> i16 {
        self.site
            .ledger
            .run(async |conn| sources::get(conn, self.simulation.deployment().id).await)
            .await
            .unwrap()
            .expect("introduced")
            .id
    }

    pub async fn newest_pass(&self) -> i64 {
        self.site
            .ledger
            .run(async |conn| books::newest_pass(conn, self.source_id().await).await)
            .await
            .unwrap()
    }

    /// Waits until a pass that began after this call is recorded, perhaps not yet read by the
    /// ledger.
    pub async fn another_pass(&self) {
        let newest = self.newest_pass().await;
        eventually(SOON, "another pass", || async { self.newest_pass().await > newest + 1 }).await;
    }

    pub async fn is_introduced(&self) {
        eventually(SOON, "the source is introduced", || async {
            self.site
                .ledger
                .run(async |conn| sources::get(conn, self.simulation.deployment().id).await)
                .await
                .unwrap()
                .is_some()
        })
        .await;
    }

    /// Waits until the ledger has everything that coderd has committed by now.
    pub async fn all_is_in(&self) {
        self.is_introduced().await;
        let (source_id, newest) = (self.source_id().await, self.newest_pass().await);
        eventually(SOON * 2, "all that coderd committed is in the ledger", || async {
            self.site
                .ledger
                .run(async |conn| books::later_pass_is_in(conn, source_id, newest).await)
                .await
                .unwrap()
        })
        .await;
    }

    pub async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.site.database.pool).await.unwrap()
    }

    /// Checks that the ledger has exactly the simulator's events.
    pub async fn everything_is_there(&self) {
        let truth = self.simulation.truth();
        let deployment = self.source_id().await;
        for (query, happened) in [
            ("select count(*) from workspace_build where source_id = $1", truth.builds.len()),
            (
                "select count(*) from prebuild_claim where source_id = $1",
                truth.builds.iter().filter(|build| build.class == Class::Claim).count(),
            ),
            ("select count(*) from usage_event where source_id = $1", truth.usage.len()),
        ] {
            let counted: i64 = sqlx::query_scalar(query)
                .bind(deployment)
                .fetch_one(&self.site.database.pool)
                .await
                .unwrap();
            assert_eq!(counted, happened as i64, "{query}");
        }
    }

    pub async fn plan(&self, lost: &str) -> Json {
        let planned =
            self.site.command(&["recover", "plan", "--lost", lost, "--output", "json"]).await;
        assert!(planned.status.success(), "{planned:?}");
        json(&planned)
    }

    /// Checks that there is nothing to execute, and that both forms of the answer report it.
    pub async fn nothing_is_lost(&self, lost: &str, message: &str) {
        let plan = self.plan(lost).await;
        assert_eq!((&plan["hash"], &plan["execute"]), (&Json::Null, &Json::Null), "{plan}");
        let planned = self.site.command(&["recover", "plan", "--lost", lost]).await;
        assert!(planned.status.success() && planned.stdout.contains(message), "{planned:?}");
        assert!(
            !planned.stdout.contains("recover execute") && !planned.stdout.contains("hash "),
            "{planned:?}"
        );
    }

    pub async fn execute(&self, plan: &Json) -> Ended {
        let hash = plan["hash"].as_str().expect("a hash");
        self.site
            .command(&[
                "recover",
                "execute",
                "--plan",
                hash,
                "--as",
                "sre-1",
                "--reason",
                "the disk is gone",
                "--output",
                "json",
            ])
            .await
    }

    /// The report of an audit, which must balance.
    pub async fn balanced(&self) -> Json {
        let audited = self.site.command(&["audit", "--output", "json"]).await;
        assert!(audited.status.success(), "{audited:?}");
        json(&audited)
    }

    /// Actor, subject and reason of the acts in the audit log.
    pub async fn acts(&self) -> Vec<(String, String, String)> {
        let query =
            "select actor, subject, reason from operator_act where act = 'recover' order by id";
        sqlx::query_as(query).fetch_all(&self.site.database.pool).await.unwrap()
    }
}

pub fn json(ended: &Ended) -> Json {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

pub async fn ends(process: &mut Process) {
    assert!(process.terminate(SOON).await.success(), "{}", process.stderr());
}
