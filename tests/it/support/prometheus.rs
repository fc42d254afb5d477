//! Real Prometheus servers of two generations, and their answers.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::process::Process;
use super::{eventually, ports, setting};

/// The server: 3.x scrapes native and classic histograms from one job, 2.42 needs two.
#[derive(Clone, Copy, Debug)]
pub enum Generation {
    Three,
    Two,
}

/// A running server with its own storage.
pub struct Prometheus {
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    process: Process,
    _folder: TempDir,
}

/// Labels without the metric's name, and the value at the time of the query.
pub type Sample = (BTreeMap<String, String>, f64);

impl Prometheus {
    /// Starts a server with this configuration file and waits until it is ready. Native histograms
    /// are enabled.
    pub async fn start(generation: Generation, configuration: &str) -> Prometheus {
        let program = setting(match generation {
            Generation::Three => "TALLYLINE_TEST_PROMETHEUS_3",
            Generation::Two => "TALLYLINE_TEST_PROMETHEUS_2",
        });
        let folder = TempDir::new().expect("a temporary folder");
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, configuration).expect("write the configuration");
        let address = format!("127.0.0.1:{}", ports::free_port());
        let mut command = Command::new(program);
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .args(["--enable-feature=native-histograms", "--log.level=warn"]);
        let mut server = Prometheus {
            url: format!("http://{address}"),
            process: Process::spawn(command),
            _folder: folder,
        };
        server.await_ready().await;
        server
    }

    async fn await_ready(&mut self) {
        let ready = format!("{}/-/ready", self.url);
        let process = &mut self.process;
        eventually(Duration::from_secs(60), "Prometheus is ready", || {
            assert!(process.runs(), "Prometheus ended: {}", process.stderr());
            let answer = reqwest::get(ready.clone());
            async move { answer.await.is_ok_and(|response| response.status().is_success()) }
        })
        .await;
    }

    /// The float samples of an instant query, sorted by labels. For native histograms use
    /// [`Prometheus::get`].
    pub async fn query(&self, promql: &str) -> Vec<Sample> {
        self.samples(promql, &[("query", promql)]).await
    }

    /// As [`Prometheus::query`], at a time in Unix seconds. A scrape that fails later does not
    /// change the answer.
    pub async fn query_at(&self, promql: &str, time: f64) -> Vec<Sample> {
        self.samples(promql, &[("query", promql), ("time", &time.to_string())]).await
    }

    async fn samples(&self, promql: &str, parameters: &[(&str, &str)]) -> Vec<Sample> {
        let data = self.get("/api/v1/query", parameters).await;
        let float = |value: &Value| value[1].as_str().and_then(|text| text.parse::<f64>().ok());
        let mut samples: Vec<Sample> = match data["resultType"].as_str() {
            Some("vector") => data["result"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| (labels(&one["metric"]), float(&one["value"])))
                .collect(),
            Some("scalar") => vec![(BTreeMap::new(), float(&data["result"]))],
            other => panic!("{promql}: no instant vector but {other:?}"),
        }
        .into_iter()
        .map(|(labels, value): (_, Option<f64>)| {
            (labels, value.unwrap_or_else(|| panic!("{promql}: not a float sample in {data}")))
        })
        .collect();
        samples.sort_by(|a, b| a.0.cmp(&b.0));
        samples
    }

    /// The `data` of an API answer.
    ///
    /// # Panics
    /// When the answer is an error, with Prometheus's own words.
    pub async fn get(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let url = reqwest::Url::parse_with_params(&format!("{}{path}", self.url), parameters)
            .expect("an address");
        let mut answer: Value =
            reqwest::get(url).await.expect("Prometheus answers").json().await.expect("JSON");
        assert_eq!(answer["status"], "success", "{path} {parameters:?}: {answer}");
        answer["data"].take()
    }
}

fn labels(metric: &Value) -> BTreeMap<String, String> {
    let all = metric.as_object().into_iter().flatten();
    all.filter(|(name, _)| *name != "__name__")
        .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
        .collect()
}
