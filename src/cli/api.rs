//! The client for the API.

use std::time::Duration;

use anyhow::Context as _;
use reqwest::redirect::Policy;
use reqwest::{Client, Method, StatusCode, Url};
use serde_json::{Map, Value};

use super::{Exit, Failure};
use crate::api::ProblemBody;
use crate::operations::ApiRequest;

/// Timeout of a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Timeout of an answer. It is longer than the server's own deadline, because the server's error
/// explains more than a timeout.
const ANSWER: Duration = Duration::from_secs(45);

/// Timeout of an answer to a request that reads or writes much.
const LONG_ANSWER: Duration = Duration::from_secs(620);

/// A serving process, and the token for it.
#[derive(Clone)]
pub struct ApiClient {
    base: Url,
    token: Option<String>,
    http: Client,
}

/// Parses the URL of an API. Plain HTTP is allowed only on this machine, because it would expose
/// the token.
pub(super) fn url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    let plain = url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    match url.scheme() {
        "https" if plain => Ok(url),
        "http" if plain && is_loopback(&url) => Ok(url),
        "http" if plain => {
            Err("must be https:// beyond this machine: a token in clear text protects nothing"
                .into())
        }
        _ => Err(
            "must be an http:// or https:// URL with a host and without user, password and query"
                .into(),
        ),
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl ApiClient {
    /// Creates the client without connecting.
    pub fn new(base: Url, token: Option<String>) -> Result<Self, Failure> {
        // a redirect could send the token to an unknown server
        let mut http = Client::builder().redirect(Policy::none()).connect_timeout(CONNECT);
        if is_loopback(&base) {
            http = http.no_proxy();
        }
        let http = http.build().map_err(|error| Failure::new(Exit::Internal, error))?;
        Ok(Self { base, token, http })
    }

    /// Sends the request, and the reason if it is a change.
    ///
    /// # Errors
    /// A [`Failure`] with the URL, the status and the answer.
    pub async fn ask<R: ApiRequest>(
        &self,
        request: &R,
        reason: &str,
    ) -> Result<R::Answer, Failure> {
        let mut fields = match serde_json::to_value(request)
            .map_err(|error| Failure::new(Exit::Internal, error))?
        {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        if !R::METHOD.is_safe() {
            fields.insert("reason".into(), reason.into());
        }
        let mut url = self.at(R::PATH, &mut fields);
        if R::METHOD != Method::POST {
            fill(&mut url, std::mem::take(&mut fields));
        }
        let mut call = self.http.request(R::METHOD, url.clone()).timeout(if R::IS_LONG {
            LONG_ANSWER
        } else {
            ANSWER
        });
        if R::METHOD == Method::POST {
            call = call.json(&fields);
        }
        if let Some(token) = &self.token {
            call = call.bearer_auth(token);
        }
        let answered = async {
            let answer = call.send().await.map_err(reqwest::Error::without_url)?;
            Ok::<_, reqwest::Error>((
                answer.status(),
                answer.bytes().await.map_err(reqwest::Error::without_url)?,
            ))
        };
        let answered = answered.await.with_context(|| format!("no answer from {url}"));
        let (status, body) = answered.map_err(|error| Failure::new(Exit::Unreachable, error))?;
        if !status.is_success() {
            return Err(refused(&url, status, &body));
        }
        let not_understood = || {
            format!(
                "{url} answers what this version does not understand; is it of the same version?"
            )
        };
        serde_json::from_slice(&body)
            .with_context(not_understood)
            .map_err(|error| Failure::new(Exit::Unreachable, error))
    }

    /// The failure of work that continued after the answer; it has the exit code of an answer with
    /// this status.
    pub fn failure(status: u16, message: &str) -> Failure {
        Failure::of(exit(status), message)
    }

    /// The URL of a path. Takes the fields that the path contains.
    fn at(&self, path: &str, fields: &mut Map<String, Value>) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path.split('/').skip(1).map(|segment| {
                let field = segment
                    .strip_prefix('{')
                    .and_then(|rest| rest.strip_suffix('}'))
                    .and_then(|name| fields.remove(name));
                field.map_or_else(|| segment.to_owned(), text)
            }));
        }
        url
    }
}

/// Adds the fields to the query in the server's notation; omits null fields.
fn fill(url: &mut Url, fields: Map<String, Value>) {
    for (name, value) in fields.into_iter().filter(|(_, value)| !value.is_null()) {
        url.query_pairs_mut().append_pair(&name, &text(value));
    }
}

fn text(value: Value) -> String {
    if let Value::String(text) = value { text } else { value.to_string() }
}

fn exit(status: u16) -> Exit {
    match status {
        // the operator must correct the request or the token
        400 | 401 | 403 | 413 | 415 => Exit::Configuration,
        404 | 409 => Exit::Refused,
        500 => Exit::Internal,
        _ => Exit::Unreachable,
    }
}

fn refused(url: &Url, status: StatusCode, body: &[u8]) -> Failure {
    let problem = match serde_json::from_slice(body) {
        Ok(ProblemBody { message, field: Some(field) }) => format!("{field}: {message}"),
        Ok(ProblemBody { message, field: None }) => message,
        Err(_) => "the answer is none of Tallyline's".to_owned(),
    };
    Failure::of(exit(status.as_u16()), format!("{url} answers {status}: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_to_this_machine_or_over_tls_only() {
        for right in [
            "http://127.0.0.1:8090",
            "http://localhost:1/",
            "http://[::1]:8090",
            "https://tallyline.example/behind/",
        ] {
            assert!(url(right).is_ok(), "{right}");
        }
        for wrong in [
            "http://10.0.0.1",
            "http://tallyline.example",
            "https://u:p@h",
            "https://h?x=1",
            "ftp://h",
            "127.0.0.1:8090",
            "x",
        ] {
            assert!(url(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn paths_are_escaped_and_queries_hold_what_is_there() {
        let client = ApiClient::new(url("https://h/behind/").unwrap(), None).unwrap();
        let fields = serde_json::json!({ "event_id": "a/b:c?%", "a": "x y&z", "b": 3, "c": null, "d": true });
        let mut fields = fields.as_object().cloned().unwrap();
        let mut at = client.at("/api/v1/events/{event_id}/explain", &mut fields);
        assert_eq!(at.as_str(), "https://h/behind/api/v1/events/a%2Fb:c%3F%25/explain");
        fill(&mut at, fields);
        assert_eq!(at.query(), Some("a=x+y%26z&b=3&d=true"));
    }

    #[test]
    fn each_status_has_its_exit_code_and_the_message_is_told() {
        let at = url("https://h").unwrap();
        for (status, exit) in [
            (400, Exit::Configuration),
            (401, Exit::Configuration),
            (403, Exit::Configuration),
            (404, Exit::Refused),
            (409, Exit::Refused),
            (500, Exit::Internal),
            (503, Exit::Unreachable),
            (302, Exit::Unreachable),
        ] {
            let failure = refused(
                &at,
                StatusCode::from_u16(status).unwrap(),
                br#"{"message":"why","field":"which"}"#,
            );
            assert_eq!(failure.exit, exit, "{status}");
            let text = failure.error.to_string();
            assert!(
                text.contains("https://h/ answers")
                    && text.contains(&status.to_string())
                    && text.ends_with("which: why"),
                "{text}"
            );
        }
        assert!(
            refused(&at, StatusCode::BAD_GATEWAY, b"<html>")
                .error
                .to_string()
                .contains("none of Tallyline's")
        );
    }
}
