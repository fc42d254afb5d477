//! Tokens for HTTP access.

use std::fmt;

use serde::Deserialize;

use super::Secret;

/// Rights of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Entitlements and counts, for coderd.
    Enforce,
    /// All read access, including `enforce`.
    Read,
    /// Everything, including changes.
    Admin,
}

/// The setting of a token.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TokenSetting {
    pub scope: Scope,
    /// The token that callers send.
    pub secret: Secret,
}

impl Scope {
    /// All scopes, the narrowest first.
    pub const ALL: [Scope; 3] = [Scope::Enforce, Scope::Read, Scope::Admin];

    /// The name in the pipeline file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Scope::Enforce => "enforce",
            Scope::Read => "read",
            Scope::Admin => "admin",
        }
    }

    /// Whether a token of this scope may do operations that need `needed`. Each scope includes the
    /// earlier ones.
    #[must_use]
    pub fn covers(self, needed: Scope) -> bool {
        self as u8 >= needed as u8
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<String> for TokenSetting {
    type Error = String;

    /// Parses `SCOPE SECRET`. The error continues the key's name and never repeats the secret.
    fn try_from(text: String) -> Result<TokenSetting, String> {
        let (scope, secret) =
            text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
        let scope = Scope::ALL.into_iter().find(|known| known.name() == scope);
        let secret = Secret::new(secret.trim());
        match scope {
            Some(scope) if secret.is_whole() => Ok(TokenSetting { scope, secret }),
            _ => Err("must be \"SCOPE SECRET\": enforce, read or admin, then a text, env:NAME, file:PATH or exec:COMMAND".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_scope_includes_the_narrower_ones() {
        let covers = |scope: Scope| Scope::ALL.map(|needed| scope.covers(needed));
        assert_eq!(covers(Scope::Enforce), [true, false, false]);
        assert_eq!(covers(Scope::Read), [true, true, false]);
        assert_eq!(covers(Scope::Admin), [true, true, true]);
    }

    #[test]
    fn a_token_is_a_scope_and_a_secret() {
        let read = TokenSetting::try_from("read  exec:vault read x ".to_owned()).unwrap();
        assert_eq!((read.scope, read.secret), (Scope::Read, Secret::new("exec:vault read x")));
        for wrong in ["", "admin", "admin ", "root hunter2", "hunter2", "read env:", "Read hunter2"]
        {
            let problem = TokenSetting::try_from(wrong.to_owned()).unwrap_err();
            assert!(problem.starts_with("must be") && !problem.contains("hunter2"), "{problem}");
        }
    }
}
