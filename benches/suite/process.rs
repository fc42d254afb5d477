//! Processes of the product, with their pipeline file, and this program again in a process of its
//! own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

/// A pipeline file with its folder.
pub struct Pipeline {
    folder: Arc<TempDir>,
}

/// A process that is killed at the end.
pub struct Process {
    child: Child,
    /// Its pipeline file remains while it runs.
    _folder: Option<Arc<TempDir>>,
}

impl Pipeline {
    /// Writes a file of these lines of TOML.
    pub fn new(lines: &str) -> Result<Pipeline> {
        let folder = TempDir::new()?;
        std::fs::write(folder.path().join("pipeline.toml"), lines)?;
        Ok(Pipeline { folder: Arc::new(folder) })
    }

    /// The same, after `tallyline migrate`, which makes the tables and topics.
    pub fn migrated(lines: &str) -> Result<Pipeline> {
        let pipeline = Pipeline::new(lines)?;
        let status = pipeline.command(&["migrate"]).status()?;
        ensure!(status.success(), "tallyline migrate: {status}");
        Ok(pipeline)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command of `tallyline` on this file. Its output goes to this program's standard error.
    pub fn command(&self, words: &[&str]) -> Command {
        // the kernel ends it if this program is killed
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_tallyline")]).args(words);
        command.arg("--pipeline").arg(self.path("pipeline.toml"));
        command.env("RUST_LOG", "error").stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Starts a process with these roles.
    pub fn start(&self, roles: &[&str], more: &[&str]) -> Result<Process> {
        let roles = roles.iter().flat_map(|role| ["--role", role]);
        let words: Vec<&str> =
            ["run"].into_iter().chain(roles).chain(more.iter().copied()).collect();
        Ok(Process {
            child: self.command(&words).spawn()?,
            _folder: Some(Arc::clone(&self.folder)),
        })
    }
}

impl Process {
    pub fn spawn(mut command: Command) -> Result<Process> {
        Ok(Process { child: command.spawn()?, _folder: None })
    }

    /// The peak of its memory in KiB. None: it has ended.
    pub fn peak_kib(&self) -> Option<u64> {
        peak_kib(format!("/proc/{}/status", self.child.id())).ok()
    }

    /// The processor time that it has used.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after_name = stat.rsplit_once(')').context("a process has a name")?.1;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / 100.0)
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Ends it as an operator does, and waits.
    pub async fn stop(&mut self) -> Result<()> {
        let pid = self.child.id().to_string();
        ensure!(Command::new("kill").args(["-TERM", &pid]).status()?.success(), "kill {pid}");
        let begun = Instant::now();
        while self.ended()?.is_none() {
            if begun.elapsed() > Duration::from_secs(60) {
                bail!("process {pid} has not stopped within 60 s");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs this program again for one task, whose answer is on its standard output.
pub fn in_a_process_of_its_own<T: DeserializeOwned>(task: &impl Serialize) -> Result<T> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--task", &serde_json::to_string(task)?])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the process for a task failed: {}", output.status);
    serde_json::from_slice(&output.stdout).context("answer of the process for a task")
}

/// The peak of this process's memory in KiB.
pub fn own_peak_kib() -> Result<u64> {
    peak_kib("/proc/self/status")
}

fn peak_kib(path: impl AsRef<Path>) -> Result<u64> {
    let status = std::fs::read_to_string(path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = line.context("VmHWM is in the status")?;
    Ok(peak.trim().trim_end_matches(" kB").parse()?)
}

/// A port that is free now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until an address answers this path with this status.
pub async fn answers(url: &str, deadline: Duration) -> Result<()> {
    let begun = Instant::now();
    loop {
        let answer = reqwest::get(url).await;
        if answer.is_ok_and(|answer| answer.status().is_success()) {
            return Ok(());
        }
        if begun.elapsed() > deadline {
            bail!("{url} has not answered within {} s", deadline.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
