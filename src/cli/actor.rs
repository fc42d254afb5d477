//! The actor and the reason of an operation.

use std::os::unix::fs::MetadataExt as _;

use super::{Exit, Failure};
use crate::operations::{Actor, reason};

/// The actor and the reason of an operation. Both are recorded in the audit log.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ActorArguments {
    /// Name of the actor for the audit log [default: your login name]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// Reason for the audit log. Discarding, pausing, pruning, retiring, reinstating, accepting and correcting need one
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, value_parser = reason)]
    reason: String,
}

impl ActorArguments {
    /// The reason alone, because with the API the actor is the token's name.
    ///
    /// # Errors
    /// [`Exit::Configuration`] if `--as` gives a name.
    pub fn reason_alone(&self) -> Result<&str, Failure> {
        match self.name {
            Some(_) => Err(Failure::of(
                Exit::Configuration,
                "--as cannot be used with --api: who acts is the token's name",
            )),
            None => Ok(&self.reason),
        }
    }

    /// The actor that these arguments name.
    #[must_use]
    pub fn actor(&self) -> Actor {
        let login = || {
            ["USER", "LOGNAME"]
                .iter()
                .find_map(|name| std::env::var(name).ok().filter(|login| !login.trim().is_empty()))
        };
        let name = self
            .name
            .clone()
            .filter(|name| !name.trim().is_empty())
            .or_else(login)
            .unwrap_or_else(user_id);
        Actor { name, reason: self.reason.clone() }
    }
}

/// The user id as a name, for users without a login name, as in containers.
fn user_id() -> String {
    std::fs::metadata("/proc/self")
        .map_or_else(|_| "unknown".to_owned(), |process| format!("uid {}", process.uid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_actor_always_has_a_name() {
        let named = |name: Option<&str>| {
            ActorArguments { name: name.map(str::to_owned), reason: String::new() }.actor().name
        };
        assert_eq!(named(Some("sre-1")), "sre-1");
        assert!(!named(None).is_empty() && !named(Some(" ")).trim().is_empty());
        assert!(user_id().starts_with("uid "));
    }
}
