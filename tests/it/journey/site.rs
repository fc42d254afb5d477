//! One deployment of Tallyline as its operator has it: a pipeline file, a ledger, a log, and
//! processes.

use tallyline::clock::Clock;
use tallyline::event::Topic;
use tallyline::event::TopicPartition;
use tallyline::ledger::{Ledger, LedgerSettings, Sequence, positions};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings};
use tempfile::TempDir;

use crate::support::process::{Ended, Process, run_tallyline, tallyline};
use crate::support::{self, Database, Kafka, ports};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Kafka,
    Postgres,
}

/// The pipeline file and its servers, also seen from outside.
pub struct Site {
    pub database: Database,
    pub ledger: Ledger,
    pub log: Log,
    /// The prefix of topic names in Kafka.
    pub prefix: Option<String>,
    folder: TempDir,
}

impl Site {
    /// On the servers of `scripts/test`; otherwise like [`Site::on`].
    pub async fn new(backend: Backend, more: &str) -> Site {
        let kafka = (backend == Backend::Kafka).then(support::kafka);
        Site::on(support::ledger::migrated().await, kafka, more).await
    }

    /// Writes the pipeline file, with these lines of TOML before the required ones, and migrates.
    /// Without a broker the log is in the database.
    pub async fn on(database: Database, kafka: Option<Kafka>, more: &str) -> Site {
        let ledger = Ledger::open(
            &LedgerSettings { url: database.url.clone(), connections: 4 },
            Clock::system(),
        )
        .expect("a ledger");
        let prefix = kafka.as_ref().map(|kafka| kafka.prefix.clone());
        let (log, lines) = match kafka {
            None => {
                (Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()), String::new())
            }
            Some(kafka) => {
                let settings = KafkaSettings {
                    topic_prefix: kafka.prefix.clone(),
                    ..KafkaSettings::new(&kafka.brokers)
                };
                let lines = format!(
                    "log.kind = 'kafka'\nkafka.brokers = '{}'\nkafka.topic_prefix = '{}'\n",
                    kafka.brokers, kafka.prefix
                );
                (Log::kafka(settings).expect("a log"), lines)
            }
        };
        let folder = TempDir::new().expect("a folder");
        let text = format!(
            "{more}ledger.url = '{}'\nledger.connections = 8\nlog.partitions = 6\n{lines}",
            database.url
        );
        std::fs::write(folder.path().join("pipeline.toml"), text).expect("write the pipeline");
        let site = Site { database, ledger, log, prefix, folder };
        let migrated = site.command(&["migrate"]).await;
        assert!(migrated.status.success(), "{migrated:?}");
        site
    }

    pub fn pipeline(&self) -> String {
        self.folder.path().join("pipeline.toml").display().to_string()
    }

    pub fn start(&self, role: &str, more: &[&str]) -> Process {
        tallyline(&[&["run", "--pipeline", &self.pipeline(), "--role", role], more].concat(), &[])
    }

    /// Runs another command to its end.
    pub async fn command(&self, words: &[&str]) -> Ended {
        run_tallyline(&[words, &["--pipeline", &self.pipeline()]].concat(), &[]).await
    }

    /// The end of every partition of the log.
    pub async fn ends(&self) -> Vec<(TopicPartition, i64)> {
        let mut ends = Vec::new();
        for topic in Topic::ALL {
            for partition in self.log.partitions(topic).await.expect("partitions") {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.log.watermarks(partition).await.expect("watermarks");
                ends.push((partition, end));
            }
        }
        ends.sort_unstable();
        ends
    }

    /// The number of records in the log.
    pub async fn appended(&self) -> i64 {
        self.ends().await.iter().map(|(_, end)| end).sum()
    }

    /// The number of events in the ledger.
    pub async fn accepted(&self) -> i64 {
        let query = "select (select count(*) from workspace_build) + (select count(*) from prebuild_claim) + (select count(*) from usage_event)";
        sqlx::query_scalar(query).fetch_one(&self.database.pool).await.expect("count events")
    }

    pub async fn has_read_all(&self) -> bool {
        let mut positions = self.ledger.run(positions::list).await.expect("positions");
        positions.sort_unstable();
        positions == self.ends().await
    }
}

/// A process with the role `serve`. It keeps its addresses after a restart.
pub struct Serve {
    pub process: Process,
    /// `http://127.0.0.1:PORT`
    pub api: String,
    /// `http://127.0.0.1:PORT/metrics`
    pub metrics: String,
    settings: [String; 2],
}

impl Serve {
    pub fn start(site: &Site) -> Serve {
        Serve::start_with(site, &[])
    }

    /// With more arguments.
    pub fn start_with(site: &Site, more: &[&str]) -> Serve {
        let (api, metrics) = (ports::free_port(), ports::free_port());
        let settings = [
            format!("serve.api_listen=127.0.0.1:{api}"),
            format!("serve.metrics_listen=127.0.0.1:{metrics}"),
        ];
        let process = Self::process(site, &settings, more);
        Serve {
            process,
            api: format!("http://127.0.0.1:{api}"),
            metrics: format!("http://127.0.0.1:{metrics}/metrics"),
            settings,
        }
    }

    fn process(site: &Site, [api, metrics]: &[String; 2], more: &[&str]) -> Process {
        site.start("serve", &[&["--set", api, "--set", metrics], more].concat())
    }

    /// Restarts it at the same addresses.
    pub fn start_again(&mut self, site: &Site) {
        self.start_again_with(site, &[]);
    }

    pub fn start_again_with(&mut self, site: &Site, more: &[&str]) {
        self.process = Self::process(site, &self.settings, more);
    }

    /// The answer of the API to this path.
    pub async fn get(&self, path: &str) -> serde_json::Value {
        let answer = reqwest::get(format!("{}{path}", self.api)).await.expect("an answer");
        assert!(answer.status().is_success(), "{path}: {answer:?}");
        answer.json().await.expect("JSON")
    }

    /// Whether it answers and both stages have folded everything up to that sequence.
    pub async fn has_folded(&self, sequence: i64) -> bool {
        let Ok(answer) = reqwest::get(format!("{}/api/v1/status", self.api)).await else {
            return false;
        };
        let Ok(status) = answer.json::<serde_json::Value>().await else { return false };
        let folded = &status["folded_sequences"];
        [&folded["metrics"], &folded["licenses"]].iter().all(|stage| {
            let folded = stage.as_str().and_then(|stage| stage.parse::<Sequence>().ok());
            folded.is_some_and(|folded| folded.number >= sequence)
        })
    }

    /// The lines of the domain series on the text page; empty if another process shows them.
    pub async fn domain_lines(&self) -> String {
        page(&self.metrics).await.unwrap_or_default()
    }
}

/// The domain series' lines of a text page, with comments. None: no answer.
pub async fn page(metrics: &str) -> Option<String> {
    // the process waits for the domain series for half of this
    let request = reqwest::Client::new()
        .get(format!("{metrics}?format=text"))
        .header("x-prometheus-scrape-timeout-seconds", "4");
    let answer = request.timeout(std::time::Duration::from_secs(10)).send().await.ok()?;
    let text = answer.error_for_status().ok()?.text().await.ok()?;
    let domain = |line: &&str| {
        let line = line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ");
        line.starts_with("coderd_") || line.starts_with("tallyline_negative_durations_total")
    };
    Some(text.lines().filter(domain).map(|line| format!("{line}\n")).collect())
}
