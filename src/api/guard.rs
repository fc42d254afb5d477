//! What stands before every path: the token, and a deadline.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, HeaderMap, WWW_AUTHENTICATE};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Serving;
use super::answer::Problem;
use super::settings::Token;

/// No answer takes longer.
const DEADLINE: Duration = Duration::from_secs(30);

/// An orchestrator's probes carry no token, and need none: they tell no numbers.
const OPEN: [&str; 2] = ["/healthz", "/readyz"];

/// Lets a request through that may be answered, and ends it in time.
pub(super) async fn guard(State(serving): State<Arc<Serving>>, request: Request, next: Next) -> Response {
    if !may_ask(serving.settings.token.as_ref(), request.uri().path(), request.headers()) {
        let problem = Problem { status: StatusCode::UNAUTHORIZED, message: "a valid bearer token is needed".into(), field: None };
        return ([(WWW_AUTHENTICATE, "Bearer")], problem).into_response();
    }
    match tokio::time::timeout(DEADLINE, next.run(request)).await {
        Ok(answer) => answer,
        Err(_) => Problem::unavailable(format!("no answer within {} seconds", DEADLINE.as_secs())).into_response(),
    }
}

fn may_ask(token: Option<&Token>, path: &str, headers: &HeaderMap) -> bool {
    let Some(token) = token else { return true };
    OPEN.contains(&path) || bearer(headers).is_some_and(|text| token.is(text))
}

/// The token of the one `Authorization` header.
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

    #[test]
    fn without_a_token_anyone_may_ask_and_with_one_only_who_has_it() {
        let token = Token::new("secret");
        assert!(may_ask(None, "/metrics", &headers(&[])));
        for right in ["Bearer secret", "bearer secret", "BEARER  secret "] {
            assert!(may_ask(Some(&token), "/metrics", &headers(&[right])), "{right}");
        }
        for wrong in
            [&[][..], &["Bearer"], &["Bearer "], &["Bearer secrets"], &["Basic secret"], &["secret"], &["Bearer x", "Bearer secret"]]
        {
            assert!(!may_ask(Some(&token), "/metrics", &headers(wrong)), "{wrong:?}");
        }
    }

    #[test]
    fn probes_need_no_token() {
        let token = Token::new("secret");
        for (path, open) in [("/healthz", true), ("/readyz", true), ("/healthz/", false), ("/api/v1/status", false), ("/nowhere", false)] {
            assert_eq!(may_ask(Some(&token), path, &headers(&[])), open, "{path}");
        }
    }
}
