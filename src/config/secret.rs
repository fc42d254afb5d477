//! Secrets. They are resolved when needed, resolved again when a server refuses them, and never
//! shown.

use std::fmt;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

/// Maximum time for a command to print a secret.
const EXEC_SECONDS: u64 = 10;

/// A longer text is treated as a mistake.
const MAX_BYTES: u64 = 64 * 1024;

/// The origin of a secret. `Debug` and `Display` do not show the secret.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct Secret(Origin);

#[derive(Clone, PartialEq, Eq)]
enum Origin {
    Literal(String),
    Variable(String),
    File(String),
    /// A program with arguments, executed without a shell.
    Command(Vec<String>),
}

/// Why a secret could not be resolved. The text names the origin, never the secret.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SecretError(String);

impl Secret {
    /// Parses `env:NAME`, `file:PATH`, `exec:COMMAND` (words separated by blanks, without a shell),
    /// or the secret itself.
    #[must_use]
    pub fn new(text: &str) -> Secret {
        Secret(if let Some(name) = text.strip_prefix("env:") {
            Origin::Variable(name.to_owned())
        } else if let Some(path) = text.strip_prefix("file:") {
            Origin::File(path.to_owned())
        } else if let Some(command) = text.strip_prefix("exec:") {
            Origin::Command(command.split_whitespace().map(str::to_owned).collect())
        } else {
            Origin::Literal(text.to_owned())
        })
    }

    /// Resolves the secret. Each call rereads the variable, the file or the command. Surrounding
    /// blanks and line ends are removed.
    pub async fn resolve(&self) -> Result<String, SecretError> {
        let text = match &self.0 {
            Origin::Literal(text) => text.clone(),
            Origin::Variable(name) => std::env::var(name).map_err(|_| {
                SecretError(format!("the variable {name} is not set (or is not UTF-8)"))
            })?,
            Origin::File(path) => read_file(path)
                .await
                .map_err(|cause| SecretError(format!("the file {path} cannot be read: {cause}")))?,
            Origin::Command(words) => run(words).await?,
        };
        let text = text.trim();
        if text.is_empty() {
            Err(SecretError(format!("{} is empty", self.origin())))
        } else {
            Ok(text.to_owned())
        }
    }

    /// The origin for messages; a command is shown without its arguments.
    #[must_use]
    pub fn origin(&self) -> String {
        match &self.0 {
            Origin::Literal(_) => "the literal secret".into(),
            Origin::Variable(name) => format!("env:{name}"),
            Origin::File(path) => format!("file:{path}"),
            Origin::Command(words) => format!("exec:{}", words.first().map_or("", String::as_str)),
        }
    }

    /// The secret itself if it is literal, to check its form.
    pub(super) fn literal(&self) -> Option<&str> {
        match &self.0 {
            Origin::Literal(text) => Some(text),
            _ => None,
        }
    }

    /// Whether the secret itself is given.
    #[must_use]
    pub fn is_literal(&self) -> bool {
        self.literal().is_some()
    }

    /// Whether the secret is an empty literal, which librdkafka accepts as a value.
    #[must_use]
    pub fn is_empty_literal(&self) -> bool {
        self.literal() == Some("")
    }

    /// Whether the origin is complete.
    pub(super) fn is_whole(&self) -> bool {
        match &self.0 {
            Origin::Literal(text) | Origin::File(text) => !text.is_empty(),
            // the system would refuse such a name
            Origin::Variable(name) => !name.is_empty() && !name.contains(['=', '\0']),
            Origin::Command(words) => !words.is_empty(),
        }
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Secret {
        Secret::new(&text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

async fn read_file(path: &str) -> std::io::Result<String> {
    let mut text = String::new();
    tokio::fs::File::open(path).await?.take(MAX_BYTES).read_to_string(&mut text).await?;
    Ok(text)
}

async fn run(words: &[String]) -> Result<String, SecretError> {
    let (program, arguments) =
        words.split_first().ok_or_else(|| SecretError("exec: is empty".to_owned()))?;
    let failed = |problem: String| SecretError(format!("the command {program} {problem}"));
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let ended = async {
        let mut child =
            command.spawn().map_err(|error| failed(format!("could not be started: {error}")))?;
        let mut text = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout
                .take(MAX_BYTES)
                .read_to_end(&mut text)
                .await
                .map_err(|error| failed(format!("could not be read: {error}")))?;
        }
        let status = child
            .wait()
            .await
            .map_err(|error| failed(format!("could not be waited for: {error}")))?;
        if !status.success() {
            return Err(failed(format!("failed ({status}); its stderr is discarded")));
        }
        String::from_utf8(text).map_err(|_| failed("printed text that is not UTF-8".into()))
    };
    tokio::time::timeout(Duration::from_secs(EXEC_SECONDS), ended)
        .await
        .unwrap_or_else(|_| Err(failed(format!("did not end within {EXEC_SECONDS} s"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        for text in ["hunter2", "env:HUNTER2", "file:/hunter2", "exec:echo hunter2"] {
            let secret = Secret::new(text);
            assert_eq!(
                format!("{secret} {secret:?} {:#?}", Some(&secret)).replace(['\n', ' ', ','], ""),
                "******Some(***)"
            );
        }
        assert!(!Secret::new("hunter2").origin().contains("hunter2"));
        assert_eq!(Secret::new("exec:vault read hunter2").origin(), "exec:vault");
    }

    #[tokio::test]
    async fn a_secret_is_read_from_its_origin_each_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token");
        let secret = Secret::new(&format!("file:{}", path.display()));
        assert!(secret.resolve().await.unwrap_err().to_string().contains("cannot be read"));
        for token in ["one\n", " two \r\n"] {
            std::fs::write(&path, token).expect("written");
            assert_eq!(secret.resolve().await.expect("readable"), token.trim());
        }
        std::fs::write(&path, "\n").expect("written");
        assert!(secret.resolve().await.unwrap_err().to_string().contains("is empty"));

        assert_eq!(Secret::new("literal").resolve().await.expect("itself"), "literal");
        let path = std::env::var("PATH").expect("a PATH");
        assert_eq!(Secret::new("env:PATH").resolve().await.expect("set"), path.trim());
        assert!(
            Secret::new("env:SURELY_NOT_SET")
                .resolve()
                .await
                .unwrap_err()
                .to_string()
                .contains("is not set")
        );
    }

    #[tokio::test]
    async fn a_command_gets_its_arguments_and_only_the_variable_path() {
        assert_eq!(
            Secret::new("exec:echo a $HOME ;b").resolve().await.expect("runs"),
            "a $HOME ;b"
        );
        let environment = Secret::new("exec:env").resolve().await.expect("runs");
        assert!(environment.lines().all(|line| line.starts_with("PATH=")), "{environment}");
        let failed =
            Secret::new("exec:false hunter2").resolve().await.expect_err("fails").to_string();
        assert!(failed.contains("false") && !failed.contains("hunter2"), "{failed}");
        assert!(Secret::new("exec:/surely/not/there").resolve().await.is_err());
    }
}
