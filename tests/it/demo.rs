//! `tallyline demo` and its effect on the machine.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::process::{Process, run_tallyline, tallyline};
use crate::support::{eventually, setting};

/// A demo that runs until it is dropped, and its output.
struct Demo {
    process: Process,
    folder: PathBuf,
}

impl Demo {
    async fn start(parent: &TempDir) -> Demo {
        let folder = parent.path().join("demo");
        let bin = setting("TALLYLINE_TEST_POSTGRES_BIN");
        let data = folder.to_str().unwrap();
        let words = ["demo", "--data", data, "--api-port", "0", "--metrics-port", "0", "--rate", "1", "--postgres-bin", &bin];
        let mut demo = Demo { process: tallyline(&words, &[]), folder };
        let process = &mut demo.process;
        eventually(Duration::from_secs(120), "the demo shows its addresses", || {
            let shown = process.stderr().contains("other commands take");
            assert!(shown || process.runs(), "the demo has ended");
            async move { shown }
        })
        .await;
        demo
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).unwrap()
    }

    /// `psql` on the ledger, with the URL of the pipeline file.
    fn psql(&self, url: &str) -> Command {
        let mut psql = Command::new(Path::new(&setting("TALLYLINE_TEST_POSTGRES_BIN")).join("psql"));
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
        assert_eq!(mode, if entry.path().is_dir() { 0o700 } else { 0o600 }, "{}: {mode:o}", entry.path().display());
    }
    // the sixth line contains the TCP addresses on which PostgreSQL listens
    assert_eq!(demo.file("postgres/postmaster.pid").lines().nth(5), Some(""));

    // its own user, with the printed pipeline file
    let pipeline = demo.folder.join("demo.toml");
    let status = run_tallyline(&["status", "--pipeline", pipeline.to_str().unwrap()], &[]).await;
    assert!(status.status.success(), "{status:?}");
    let text = demo.file("demo.toml");
    let url = text.lines().find_map(|line| line.strip_prefix("url = \"")?.strip_suffix('"')).expect("the ledger's URL");
    assert!(demo.psql(url).output().unwrap().status.success());

    // another user, even with the password, if this test may switch users; then without the password
    if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
        let mut other = demo.psql(url);
        other.uid(65_534).gid(65_534);
        assert_refused(other, "Permission denied");
    }
    let (_, address) = url.split_once('@').expect("a user and a password");
    assert_refused(demo.psql(&format!("postgres://postgres@{address}")), "no password supplied");

    assert!(demo.process.terminate(Duration::from_secs(120)).await.success());
}
