//! A running site on Kafka with the shipped settings: its processes, and events that are appended
//! to its log as a collector does.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context as _, Result};
use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use sqlx::PgPool;
use tallyline::clock::Clock;
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::log::Log;
use tallyline_sim::tallyman::{Config, Tallyman};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::Suite;
use crate::coderd::Coderd;
use crate::process::{Pipeline, Process, free_port};
use crate::servers::Database;
use crate::{events, intake};

const SWEPT: &str = "select exists (select from collector_progress, completeness(source_id, null) done where done.swept_pass_id > 0)";

pub struct Site {
    pub coderd: Coderd,
    pub ledger: Database,
    log: Log,
    pub vendor: Tallyman,
    pipeline: Pipeline,
    _stop_at_the_end: DropGuard,
}

/// A process with the role `serve`.
pub struct Serving {
    pub process: Process,
    pub metrics: SocketAddr,
    pub api: SocketAddr,
}

impl Site {
    /// A small deployment whose history is collected.
    pub async fn new(suite: &Suite) -> Result<Site> {
        let servers = &suite.servers;
        let (coderd, ledger) = (Coderd::new(servers, 50).await?, servers.ledger().await?);
        let stop = CancellationToken::new();
        let vendor = Tallyman::start(Config::default(), Clock::system(), stop.clone()).await?;
        let prefix = format!("bench{}.", Uuid::new_v4().simple());
        let key = coderd.simulation.license_key();
        let pipeline = Pipeline::migrated(&format!(
            "ledger.url = '{}'\nlog.kind = 'kafka'\nkafka.brokers = '{}'\nkafka.topic_prefix = '{prefix}'\nsource.coderd_url = '{}'\n\
             publish.mode = 'sole'\npublish.url = '{}'\npublish.interval_seconds = 0.5\nserve.audit_seconds = 86400\n\
             [license.public_keys]\n'{}' = '''\n{}'''\n",
            ledger.url,
            servers.brokers,
            coderd.database.url,
            vendor.ingest_url(),
            key.kid,
            key.public_key_pem,
        ))?;
        let mut collecting = pipeline.start(&["collect", "consume"], &[])?;
        ledger.wait("the deployment is collected", Duration::from_secs(120), SWEPT).await?;
        collecting.stop().await?;
        let log = intake::log(servers, &prefix)?;
        Ok(Site { coderd, ledger, log, vendor, pipeline, _stop_at_the_end: stop.drop_guard() })
    }

    pub fn start(&self, role: &str) -> Result<Process> {
        self.pipeline.start(&[role], &[])
    }

    pub fn serve(&self) -> Result<Serving> {
        let metrics = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let api = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let settings =
            [format!("serve.api_listen={api}"), format!("serve.metrics_listen={metrics}")];
        let more = ["--set", settings[0].as_str(), "--set", settings[1].as_str()];
        let process = self.pipeline.start(&["serve"], &more)?;
        Ok(Serving { process, metrics, api })
    }

    /// The site's log and its coderd, for events.
    pub async fn source(&self) -> Result<Source> {
        let coderd = PgPool::connect(&self.coderd.database.url).await?;
        Ok(Source {
            log: self.log.clone(),
            coderd,
            deployment: self.coderd.simulation.deployment().id,
        })
    }
}

/// Appends events of the site's deployment. Clones share the connections.
#[derive(Clone)]
pub struct Source {
    log: Log,
    coderd: PgPool,
    deployment: Uuid,
}

impl Source {
    /// Appends creations with these numbers, completed now. Returns their places.
    pub async fn append_creations(&self, numbers: Range<u32>) -> Result<Vec<(i32, i64)>> {
        let now = now();
        let creation = |number| {
            // the first build of another workspace
            let mut event = events::event(number * 5);
            event.deployment = self.deployment;
            if let Payload::Build(build) = &mut event.payload {
                let person = Uuid::from_u128(7);
                (build.owner_id, build.initiator_id, build.stage) = (person, person, None);
                build.first_build_by_prebuilds_user = false;
                build.completed_at = now;
                build.started_at = Some(now - TimeDelta::seconds(20));
                build.created_at = now - TimeDelta::seconds(21);
                build.organization_name = "organization".to_owned();
                build.template_name = "template".to_owned();
                build.preset_name = String::new();
            }
            event.to_message()
        };
        Ok(self.log.append(Topic::WorkspaceBuilds, numbers.map(creation).collect()).await?)
    }

    /// Writes a usage row as coderd does, and appends its event. Returns the event's place.
    pub async fn append_usage(&self, id: &str) -> Result<Vec<(i32, i64)>> {
        let (quantity, created_at) = (UsageQuantity::ManagedAgents(1), now());
        sqlx::query("insert into usage_events (id, event_type, event_data, created_at) values ($1, 'dc_managed_agents_v1', '{\"count\": 1}', $2)")
            .bind(id)
            .bind(created_at)
            .execute(&self.coderd)
            .await?;
        let usage =
            Usage { id: id.to_owned(), quantity, created_at, marks: PublishMarks::default() };
        let event = Event { deployment: self.deployment, payload: Payload::Usage(usage) };
        Ok(self.log.append(Topic::AgentUsage, vec![event.to_message()]).await?)
    }
}

/// The time in whole microseconds, as coderd's database has it.
fn now() -> DateTime<Utc> {
    Clock::system().now().trunc_subsecs(6)
}

impl Serving {
    /// The creations that it shows. None: it shows no domain series.
    pub async fn creations(&self) -> Option<u64> {
        let page = reqwest::get(format!("http://{}/metrics", self.metrics)).await.ok()?;
        let page = page.text().await.ok()?;
        let mut lines =
            page.lines().filter(|line| line.starts_with("coderd_workspace_creation_total{"));
        let first = lines.next()?;
        let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        let sum = [first].into_iter().chain(lines).filter_map(value).sum::<f64>();
        Some(sum as u64)
    }

    /// Waits until it shows domain series, and returns their sum.
    pub async fn shows(&self, deadline: Duration) -> Result<u64> {
        tokio::time::timeout(deadline, async {
            loop {
                if let Some(creations) = self.creations().await {
                    return creations;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .with_context(|| format!("no series within {} s", deadline.as_secs()))
    }
}
