//! `tallyline run` as an operator sees it: real processes, and dependencies that are missing,
//! disappear, freeze or return changed.

mod faults;
mod over_api;
mod pauses;
mod processes;
mod properties;
pub mod proxy;
mod prune;
mod recreated;
mod refusals;
mod sizes;
mod stalled;
mod start;
mod status;
mod stop;
mod sweep;
mod takeover;
mod timestamps;
mod transactions;

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::Value;
use tallyline::clock::Clock;
use tallyline::event::{Event, Message, Topic};
use tallyline::ledger::{Ledger, LedgerSettings};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings};
use tallyline_sim::coderd::{Config, SchemaVersion, Simulation};
use tempfile::TempDir;

use crate::support::process::{Ended, Process, run_tallyline, tallyline};
use crate::support::{self, Database, Kafka, assert_described, database, eventually};

/// Everything here happens within this, also on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// The documented grace period of `tallyline run` after SIGTERM.
const GRACE: Duration = Duration::from_secs(15);
/// The additional time for its exit on a busy machine.
const LEEWAY: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kafka,
    Postgres,
}

/// A pipeline file and its servers. Settings are lines of TOML with dotted keys; the last one of a
/// key applies.
struct Site {
    ledger: Database,
    kafka: Option<Kafka>,
    folder: TempDir,
    settings: Vec<(String, String)>,
}

impl Site {
    /// A ledger that is not migrated yet.
    async fn bare(kind: Kind) -> Site {
        Site::on(kind, database().await)
    }

    fn on(kind: Kind, ledger: Database) -> Site {
        let mut site =
            Site { settings: Vec::new(), kafka: None, folder: TempDir::new().unwrap(), ledger };
        site.set("roles", "['consume', 'serve']");
        site.set("ledger.url", &format!("'{}'", site.ledger.url.clone()));
        site.set("ledger.connections", "6");
        site.set("log.partitions", "3");
        site.set("serve.api_listen", "'127.0.0.1:0'");
        site.set("serve.metrics_listen", "'127.0.0.1:0'");
        if kind == Kind::Kafka {
            let kafka = support::kafka();
            site.set("log.kind", "'kafka'");
            site.set("kafka.brokers", &format!("'{}'", kafka.brokers));
            site.set("kafka.topic_prefix", &format!("'{}'", kafka.prefix));
            site.kafka = Some(kafka);
        }
        site
    }

    /// With the ledger's schema and the log's topics.
    async fn new(kind: Kind) -> Site {
        let site = Site::on(kind, support::ledger::migrated().await);
        site.migrate().await;
        site
    }

    async fn migrate(&self) {
        let migrated = self.command("migrate").await;
        assert!(migrated.status.success(), "{migrated:?}");
    }

    /// With the tests' deployment registered, as its collector does.
    async fn registered(kind: Kind) -> Site {
        let site = Site::new(kind).await;
        site.register(support::ledger::DEPLOYMENT).await;
        site
    }

    async fn register(&self, deployment: uuid::Uuid) {
        let settings = LedgerSettings { url: self.ledger.url.clone(), connections: 1 };
        let ledger = Ledger::open(&settings, Clock::manual(support::ledger::noon())).unwrap();
        support::ledger::register(&ledger, &[deployment]).await;
    }

    fn set(&mut self, key: &str, value: &str) {
        self.settings.retain(|(known, _)| known != key);
        self.settings.push((key.to_owned(), value.to_owned()));
    }

    /// Writes the file with the current settings. A process never reads half of it.
    fn file(&self) -> String {
        let path = self.folder.path().join("pipeline.toml");
        let text: String =
            self.settings.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        let part = self.folder.path().join(format!("{}.part", uuid::Uuid::new_v4()));
        std::fs::write(&part, text).unwrap();
        std::fs::rename(part, &path).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Runs a command to its end. Blanks separate its words.
    async fn command(&self, words: &str) -> Ended {
        let (file, words) = (self.file(), words.split_whitespace().collect::<Vec<_>>());
        run_tallyline(&[&words[..], &["--pipeline", &file]].concat(), &[]).await
    }

    /// Starts `tallyline run`.
    fn start(&self, words: &str) -> Running {
        let (file, words) = (self.file(), words.split_whitespace().collect::<Vec<_>>());
        let arguments =
            [&["run", "--pipeline", &file, "--log-format", "json"], &words[..]].concat();
        Running { process: tallyline(&arguments, &[]) }
    }

    /// The log, without a proxy.
    fn log(&self) -> Log {
        match &self.kafka {
            Some(kafka) => {
                let settings = KafkaSettings {
                    topic_prefix: kafka.prefix.clone(),
                    ..KafkaSettings::new(&kafka.brokers)
                };
                Log::kafka(settings).unwrap()
            }
            None => Log::postgres(self.ledger.pool.clone(), PostgresLogSettings::default()),
        }
    }

    /// `tallyline status` as JSON.
    async fn status(&self) -> Value {
        let status = self.command("status --output json").await;
        serde_json::from_str(&status.stdout).unwrap_or_else(|error| panic!("{error}: {status:?}"))
    }

    async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.ledger.pool).await.unwrap()
    }

    /// Waits until the ledger has this number of builds.
    async fn builds(&self, count: i64) {
        eventually(SOON * 2, "the builds are in the ledger", || async {
            self.count("select count(*) from workspace_build").await >= count
        })
        .await;
    }

    /// The audit's joint of log and ledger, which must balance.
    async fn balanced(&self) -> Value {
        let audited = self.command("audit --output json --patience 1").await;
        let report: Value = serde_json::from_str(&audited.stdout)
            .unwrap_or_else(|error| panic!("{error}: {audited:?}"));
        let joints = report["joints"].as_array().unwrap();
        let joint = joints
            .iter()
            .find(|joint| joint["name"] == "log and ledger")
            .expect("the joint")
            .clone();
        assert_eq!(joint["differences"], serde_json::json!([]), "{report}");
        joint["numbers"].clone()
    }

    /// Gives the site a coderd with a short history, and returns it.
    async fn with_coderd(&mut self) -> Coderd {
        let (database, now) = (database().await, Clock::system().now());
        let config =
            Config::history(7, SchemaVersion::TasksEra, now - chrono::TimeDelta::days(5), now, 120);
        let mut simulation = Simulation::start(config, &database.url).await.unwrap();
        simulation.advance_to(now).await.unwrap();
        simulation.commit_held().await.unwrap();
        let key = simulation.license_key();
        self.set(
            &format!("license.public_keys.{}", key.kid),
            &format!("'''\n{}'''", key.public_key_pem),
        );
        self.set("source.coderd_url", &format!("'{}'", database.url));
        self.set("collect.poll_seconds", "0.2");
        self.set("collect.margin_seconds", "1");
        self.set("publish.interval_seconds", "0.2");
        Coderd { database, simulation }
    }
}

struct Coderd {
    database: Database,
    simulation: Simulation,
}

/// Repeats `probe` until it returns a value.
async fn eventually_some<T>(
    deadline: Duration,
    what: &str,
    probe: impl AsyncFn() -> Option<T>,
) -> T {
    let searched = async {
        loop {
            if let Some(value) = probe().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(deadline, searched)
        .await
        .unwrap_or_else(|_| panic!("not within {deadline:?}: {what}"))
}

fn messages(events: impl Iterator<Item = Event>) -> Vec<Message> {
    events.map(|event| event.to_message()).collect()
}

/// Appends these builds of the tests' deployment; each number is a separate build.
async fn append_builds(log: &Log, numbers: std::ops::Range<u32>) {
    let builds = messages(numbers.map(|n| support::ledger::build(support::ledger::DEPLOYMENT, n)));
    log.append(Topic::WorkspaceBuilds, builds).await.unwrap();
}

struct Running {
    process: Process,
}

impl Running {
    /// The log's lines until now.
    fn lines(&self) -> Vec<Value> {
        self.process.stderr().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a line that contains all these words.
    async fn says(&self, words: &[&str]) -> String {
        eventually_some(SOON, &format!("it says {words:?}"), async || {
            let text = self.process.stderr();
            text.lines()
                .find(|line| words.iter().all(|word| line.contains(word)))
                .map(str::to_owned)
        })
        .await
    }

    /// The address of its API.
    async fn api(&self) -> String {
        self.says(&["\"message\":\"listening\"", "\"api\":"]).await;
        let line = self
            .lines()
            .into_iter()
            .find(|line| line["message"] == "listening" && line["api"].is_string())
            .expect("listening");
        format!("http://{}", line["api"].as_str().unwrap())
    }

    /// The answer of the API to this path.
    async fn get(&self, path: &str) -> (StatusCode, Value) {
        let url = format!("{}{path}", self.api().await);
        let client =
            reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
        let answer = client.get(&url).send().await.unwrap_or_else(|error| panic!("{url}: {error}"));
        (answer.status(), answer.json().await.unwrap())
    }

    /// The text page of `/metrics`.
    async fn metrics(&self) -> String {
        self.api().await;
        let line = self
            .lines()
            .into_iter()
            .find(|line| line["message"] == "listening" && line["metrics"].is_string())
            .expect("listening");
        let url = format!("http://{}/metrics?format=text", line["metrics"].as_str().unwrap());
        let client =
            reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
        let answer = client.get(&url).send().await;
        let page = answer.unwrap_or_else(|error| panic!("{url}: {error}")).text().await.unwrap();
        assert_described(&page);
        page
    }

    /// Waits until it is ready.
    async fn ready(&self) {
        eventually(SOON, "the process is ready", || async {
            self.get("/readyz").await.0 == StatusCode::OK
        })
        .await;
    }

    /// Waits until this check fails with a reason that contains all these words, in a living
    /// process. Returns the reason.
    async fn not_ready(&self, check: &str, words: &[&str]) -> String {
        let why =
            eventually_some(SOON, &format!("{check} is not ready because {words:?}"), async || {
                let (status, body) = self.get("/readyz").await;
                let check = &body["checks"][check];
                let why = check["why"]
                    .as_str()
                    .filter(|why| words.iter().all(|word| why.contains(word)))?;
                (status == StatusCode::SERVICE_UNAVAILABLE && check["ok"] == false)
                    .then(|| why.to_owned())
            })
            .await;
        assert_eq!(self.get("/healthz").await.0, StatusCode::OK);
        why
    }

    /// Sends SIGTERM. It must end with 0 within the grace period. Returns the time that it took.
    async fn ends_in_order(&mut self) -> Duration {
        let begun = Instant::now();
        let status = self.process.terminate(GRACE + LEEWAY).await;
        assert_eq!(status.code(), Some(0), "{}", self.process.stderr());
        begun.elapsed()
    }
}
