//! Real processes, started and ended as by an operator or a fault.

use std::ffi::OsStr;
use std::fs::File;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::eventually;

/// A running program whose output goes to files. It is killed when this value is dropped; a failing
/// test shows its last output.
pub struct Process {
    name: String,
    child: Child,
    folder: TempDir,
}

/// The status and output of an ended program.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Starts the `tallyline` binary under test. It sees only the given `TALLYLINE_…` variables.
pub fn tallyline(arguments: &[&str], environment: &[(&str, &str)]) -> Process {
    let mut command = bound(env!("CARGO_BIN_EXE_tallyline"), "KILL");
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TALLYLINE_"))
    {
        command.env_remove(name);
    }
    command.args(arguments).envs(environment.iter().copied());
    Process::spawn(command)
}

/// A program that gets this signal when the thread that started it ends, so that it never outlives
/// a test run.
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
    /// Starts a program with an empty standard input.
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

    /// Its standard output until now.
    pub fn stdout(&self) -> String {
        self.written("stdout")
    }

    /// Its standard error until now.
    pub fn stderr(&self) -> String {
        self.written("stderr")
    }

    /// `kill -9`, and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Sends SIGTERM and returns the exit status, within the deadline.
    pub async fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal("TERM");
        self.ends_within(deadline).await
    }

    /// Freezes it (SIGSTOP), like a machine that hangs.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// Continues it (SIGCONT).
    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// Waits for its end.
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

    /// Whether it still runs (also while paused).
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Sends a signal by its name without `SIG`, and does not wait.
    pub fn signal(&self, signal: &str) {
        // The shell's own kill: a bare Debian does not have the program.
        let sent = Command::new("sh")
            .args(["-c", "kill -s \"$0\" \"$1\"", signal, &self.pid().to_string()])
            .status()
            .expect("run sh");
        assert!(sent.success(), "{} could not be sent SIG{signal}", self.name);
    }

    fn written(&self, name: &str) -> String {
        String::from_utf8_lossy(
            &std::fs::read(self.folder.path().join(name)).expect("the output's file"),
        )
        .into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let stderr = self.written("stderr");
            let begin = stderr.lines().count().saturating_sub(30);
            eprintln!(
                "last words of {}:\n{}",
                self.name,
                stderr.lines().skip(begin).collect::<Vec<_>>().join("\n")
            );
        }
    }
}
