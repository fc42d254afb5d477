//! Real processes, started and ended as an operator or a fault would.

use std::ffi::OsStr;
use std::fs::File;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::eventually;

/// A running program whose output goes to files. It is killed when this value goes; in a test that fails, its last words are shown.
pub struct Process {
    name: String,
    child: Child,
    folder: TempDir,
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Starts the `tallyline` binary under test. It sees no `TALLYLINE_…` variable but the given ones.
pub fn tallyline(arguments: &[&str], environment: &[(&str, &str)]) -> Process {
    let mut command = bound(env!("CARGO_BIN_EXE_tallyline"), "KILL");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TALLYLINE_")) {
        command.env_remove(name);
    }
    command.args(arguments).envs(environment.iter().copied());
    Process::spawn(command)
}

/// A program that gets this signal when the thread that started it ends, so that it outlives no test run, however that ends.
pub fn bound(program: &str, signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal, program]);
    command
}

/// Runs the `tallyline` binary to its end, which must come within a minute.
pub async fn run_tallyline(arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut process = tallyline(arguments, environment);
    let status = process.ends_within(Duration::from_secs(60)).await;
    Ended { status, stdout: process.stdout(), stderr: process.stderr() }
}

impl Process {
    /// Starts a program with nothing on its standard input.
    pub fn spawn(mut command: Command) -> Process {
        let folder = TempDir::new().expect("a temporary folder");
        let file = |name| File::create(folder.path().join(name)).expect("a file for the output");
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let name = words.map(OsStr::to_string_lossy).take(12).collect::<Vec<_>>().join(" ");
        let child = command
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .unwrap_or_else(|error| panic!("start {name}: {error}"));
        Process { name, child, folder }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.written("stdout")
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.written("stderr")
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Asks it to end (SIGTERM) and says how it did, within the deadline.
    pub async fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal("TERM");
        self.ends_within(deadline).await
    }

    /// Stops it where it stands (SIGSTOP), as a machine that hangs.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets it go on (SIGCONT).
    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// How it ended by itself.
    pub async fn ends_within(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        let mut status = None;
        eventually(deadline, &what, || {
            status = self.child.try_wait().expect("wait");
            let ended = status.is_some();
            async move { ended }
        })
        .await;
        status.expect("it ended")
    }

    /// It still runs (also while paused).
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Sends a signal by its name without `SIG`, and waits for nothing.
    pub fn signal(&self, signal: &str) {
        // The shell's own kill: a bare Debian has no program of that name.
        let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &self.pid().to_string()]).status().expect("run sh");
        assert!(sent.success(), "{} could not be sent SIG{signal}", self.name);
    }

    fn written(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.path().join(name)).expect("the output's file")).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let stderr = self.written("stderr");
            let begin = stderr.lines().count().saturating_sub(30);
            eprintln!("last words of {}:\n{}", self.name, stderr.lines().skip(begin).collect::<Vec<_>>().join("\n"));
        }
    }
}
