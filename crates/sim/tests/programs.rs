//! `tallyline-demo` and its effect on the machine, and a simulator by itself.

use std::fs::File;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser as _;
use serde_json::Value;
use tallyline::cli::{self, Cli, Context, Exit};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// The program under test, with its output in files. It is killed when this value is dropped.
struct Program {
    child: Child,
    output: TempDir,
}

impl Program {
    /// Starts it without `TALLYLINE_…` variables. It ends with the thread that started it.
    fn start(words: &[&str]) -> Program {
        let output = TempDir::new().unwrap();
        let file = |name| File::create(output.path().join(name)).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_tallyline-demo")]).args(words);
        let is_setting = |name: &str| name.starts_with("TALLYLINE_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(&name.to_string_lossy()))
        {
            command.env_remove(name);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .unwrap();
        Program { child, output }
    }

    fn stdout(&self) -> String {
        std::fs::read_to_string(self.output.path().join("stdout")).unwrap()
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.output.path().join("stderr")).unwrap()
    }

    /// Waits until stdout or stderr contains the words.
    async fn shows(&mut self, words: &str) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !self.stdout().contains(words) && !self.stderr().contains(words) {
            assert_eq!(self.child.try_wait().unwrap(), None, "it has ended: {}", self.stderr());
            assert!(Instant::now() < deadline, "it does not show {words:?}: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends SIGTERM and waits for a successful end.
    async fn ends_in_order(&mut self) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("sh")
                .args(["-c", "kill -s TERM \"$0\"", &pid])
                .status()
                .unwrap()
                .success()
        );
        let deadline = Instant::now() + Duration::from_secs(120);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(status.success(), "{status}: {}", self.stderr());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The folder of PostgreSQL's programs, as `scripts/with-servers` sets it.
fn postgres_bin() -> String {
    std::env::var("TALLYLINE_TEST_POSTGRES_BIN")
        .expect("TALLYLINE_TEST_POSTGRES_BIN is set: run scripts/test")
}

/// A demo that runs until it is dropped, and its output.
struct Demo {
    program: Program,
    folder: PathBuf,
}

impl Demo {
    async fn start(parent: &TempDir) -> Demo {
        let folder = parent.path().join("demo");
        let bin = postgres_bin();
        let data = folder.to_str().unwrap();
        let words = [
            "--data",
            data,
            "--api-port",
            "0",
            "--metrics-port",
            "0",
            "--rate",
            "1",
            "--postgres-bin",
            &bin,
        ];
        let mut demo = Demo { program: Program::start(&words), folder };
        demo.program.shows("other commands take").await;
        demo
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).unwrap()
    }

    /// `psql` on the ledger, with the URL of the pipeline file.
    fn psql(&self, url: &str) -> Command {
        let mut psql = Command::new(Path::new(&postgres_bin()).join("psql"));
        psql.args(["--no-password", "--command", "select 1", url]).current_dir("/");
        psql
    }
}

/// Checks that it ended with an error that contains these words.
fn assert_refused(mut command: Command, words: &str) {
    let ended = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && stderr.contains(words), "{ended:?}");
}

#[tokio::test]
async fn the_demo_is_closed_to_other_users_of_the_machine() {
    let parent = TempDir::new().unwrap();
    // PostgreSQL may run as another user, who must pass through this folder
    std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let mut demo = Demo::start(&parent).await;

    for entry in std::fs::read_dir(&demo.folder).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().mode() & 0o7777;
        assert_eq!(
            mode,
            if entry.path().is_dir() { 0o700 } else { 0o600 },
            "{}: {mode:o}",
            entry.path().display()
        );
    }
    // the sixth line contains the TCP addresses on which PostgreSQL listens
    assert_eq!(demo.file("postgres/postmaster.pid").lines().nth(5), Some(""));

    // its own user, with the printed pipeline file
    let pipeline = demo.folder.join("demo.toml");
    let cli =
        Cli::try_parse_from(["tallyline", "status", "--pipeline", pipeline.to_str().unwrap()])
            .unwrap();
    let context = Context {
        clock: cli.global.clock(),
        stop: CancellationToken::new(),
        output: cli.global.output,
    };
    assert_eq!(cli::run(cli.command, context).await.unwrap(), Exit::Success);
    let text = demo.file("demo.toml");
    let url = text
        .lines()
        .find_map(|line| line.strip_prefix("url = \"")?.strip_suffix('"'))
        .expect("the ledger's URL");
    assert!(demo.psql(url).output().unwrap().status.success());

    // another user, even with the password, if this test may switch users; then without the
    // password
    if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
        let mut other = demo.psql(url);
        other.uid(65_534).gid(65_534);
        assert_refused(other, "Permission denied");
    }
    let (_, address) = url.split_once('@').expect("a user and a password");
    assert_refused(demo.psql(&format!("postgres://postgres@{address}")), "no password supplied");

    demo.program.ends_in_order().await;
}

#[tokio::test]
async fn a_simulator_prints_its_address_and_ends_in_order() {
    let mut simulator =
        Program::start(&["tallyman-sim", "--listen", "127.0.0.1:0", "--log-format", "json"]);
    simulator.shows("http://127.0.0.1:").await;
    simulator.ends_in_order().await;
    assert_eq!(simulator.stdout().lines().count(), 1);
    assert!(simulator.stdout().contains("http://127.0.0.1:"), "{}", simulator.stdout());
    for line in simulator.stderr().lines() {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
}
