//! Access by bearer tokens. Each token has one scope.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq as _;

use super::answer::Problem;
use crate::config::Scope;

/// The valid tokens. Clones share them. An empty set stays empty, and a set with tokens never
/// becomes empty.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Arc<RwLock<Arc<[Token]>>>);

impl Tokens {
    /// Replaces the tokens. Returns whether they differ.
    pub fn replace(&self, tokens: Vec<Token>) -> bool {
        let before = std::mem::replace(
            &mut *self.0.write().unwrap_or_else(PoisonError::into_inner),
            tokens.into(),
        );
        *before != *self.now()
    }

    #[must_use]
    pub fn now(&self) -> Arc<[Token]> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl From<Vec<Token>> for Tokens {
    fn from(tokens: Vec<Token>) -> Self {
        Self(Arc::new(RwLock::new(tokens.into())))
    }
}

/// A bearer token, stored as a hash. Its name is the actor in the audit log.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    name: String,
    scope: Scope,
    hash: [u8; 32],
}

impl Token {
    #[must_use]
    pub fn new(name: &str, scope: Scope, text: &str) -> Self {
        Self { name: name.to_owned(), scope, hash: hash_of(text) }
    }

    /// Whether two tokens have the same text, so that the caller would be ambiguous.
    #[must_use]
    pub fn has_text_of(&self, other: &Token) -> bool {
        self.hash == other.hash
    }

    /// Whether this is the hash of the token's text. The time of the comparison reveals nothing,
    /// because it compares complete hashes.
    fn has(&self, hash: &[u8; 32]) -> bool {
        self.hash.ct_eq(hash).into()
    }
}

fn hash_of(text: &str) -> [u8; 32] {
    Sha256::digest(text).into()
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) ***", self.name, self.scope)
    }
}

/// The right that a path requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Nothing: probes and the document need no token, because they contain no numbers.
    Nothing,
    /// Any token, if tokens are configured: only callers with a token may learn that a path is
    /// unknown.
    AnyToken,
    /// A token with a scope that covers this one. Without configured tokens, loopback may read, but
    /// changes are refused.
    Scope(Scope),
}

/// The caller: the token's name, if there was a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Caller(pub(super) Option<String>);

/// The caller of a request with these headers, if it has the right.
pub(super) fn admit(
    tokens: &[Token],
    headers: &HeaderMap,
    needs: Needs,
) -> Result<Caller, Problem> {
    match needs {
        Needs::Nothing => return Ok(Caller(None)),
        Needs::Scope(Scope::Admin) if tokens.is_empty() => {
            return Err(Problem::forbidden(
                "this needs a token of scope admin, and no token is configured: set serve.tokens.NAME = \"admin SECRET\"",
            ));
        }
        Needs::AnyToken | Needs::Scope(_) if tokens.is_empty() => return Ok(Caller(None)),
        Needs::AnyToken | Needs::Scope(_) => {}
    }
    let token = bearer(headers)
        .map(hash_of)
        .and_then(|hash| tokens.iter().find(|token| token.has(&hash)))
        .ok_or_else(Problem::unauthorized)?;
    match needs {
        Needs::Scope(scope) if !token.scope.covers(scope) => Err(Problem::forbidden(format!(
            "this needs a token of scope {scope}; {} has the scope {}",
            token.name, token.scope
        ))),
        _ => Ok(Caller(Some(token.name.clone()))),
    }
}

/// The token of the only `Authorization` header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let (scheme, token) = all.next()?.to_str().ok()?.split_once(' ')?;
    (all.next().is_none() && scheme.eq_ignore_ascii_case("bearer")).then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (AUTHORIZATION, value.parse().unwrap())).collect()
    }

    fn tokens() -> [Token; 3] {
        Scope::ALL
            .map(|scope| Token::new(&format!("the-{scope}"), scope, &format!("secret {scope}")))
    }

    fn status(tokens: &[Token], authorization: &[&str], needs: Needs) -> u16 {
        admit(tokens, &headers(authorization), needs)
            .map_or_else(|problem| problem.status.as_u16(), |_| 200)
    }

    #[test]
    fn a_token_is_known_again_and_never_printed() {
        let token = Token::new("grafana", Scope::Read, "correct horse");
        assert!(token.has(&hash_of("correct horse")));
        for other in ["", "correct hors", "correct horse ", "Correct horse"] {
            assert!(!token.has(&hash_of(other)), "{other:?}");
        }
        assert_eq!(format!("{token:?}"), "grafana (read) ***");
        assert!(token.has_text_of(&Token::new("other", Scope::Admin, "correct horse")));
    }

    #[test]
    fn without_tokens_reads_are_open_and_changes_are_refused() {
        for (needs, answer) in [
            (Needs::Nothing, 200),
            (Needs::AnyToken, 200),
            (Needs::Scope(Scope::Enforce), 200),
            (Needs::Scope(Scope::Read), 200),
            (Needs::Scope(Scope::Admin), 403),
        ] {
            assert_eq!(status(&[], &[], needs), answer, "{needs:?}");
            assert_eq!(status(&[], &["Bearer secret admin"], needs), answer, "{needs:?}");
        }
    }

    #[test]
    fn one_right_header_is_needed() {
        let read = Needs::Scope(Scope::Read);
        for right in ["Bearer secret read", "bearer secret read", "BEARER  secret read "] {
            assert_eq!(status(&tokens(), &[right], read), 200, "{right}");
        }
        for wrong in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &["Bearer secret reads"],
            &["Basic secret read"],
            &["secret read"],
            &["Bearer x", "Bearer secret read"],
        ] {
            assert_eq!(status(&tokens(), wrong, read), 401, "{wrong:?}");
            assert_eq!(status(&tokens(), wrong, Needs::AnyToken), 401, "{wrong:?}");
            assert_eq!(status(&tokens(), wrong, Needs::Nothing), 200, "{wrong:?}");
        }
    }

    #[test]
    fn a_token_is_good_for_its_scope_and_the_narrower_ones() {
        let asked =
            |scope: Scope, needs| status(&tokens(), &[&format!("Bearer secret {scope}")], needs);
        for (scope, answers) in [
            (Scope::Enforce, [200, 403, 403]),
            (Scope::Read, [200, 200, 403]),
            (Scope::Admin, [200, 200, 200]),
        ] {
            assert_eq!(
                Scope::ALL.map(|needed| asked(scope, Needs::Scope(needed))),
                answers,
                "{scope}"
            );
            assert_eq!(asked(scope, Needs::AnyToken), 200);
        }
        let refused =
            admit(&tokens(), &headers(&["Bearer secret read"]), Needs::Scope(Scope::Admin))
                .unwrap_err();
        assert_eq!(
            refused.message,
            "this needs a token of scope admin; the-read has the scope read"
        );
        let caller =
            admit(&tokens(), &headers(&["Bearer secret admin"]), Needs::Scope(Scope::Admin));
        assert_eq!(caller, Ok(Caller(Some("the-admin".into()))));
    }
}
