//! The client for the API.

use std::time::Duration;

use anyhow::Context as _;
use reqwest::redirect::Policy;
use reqwest::{Client, Method, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Exit, Failure};
use crate::api::ProblemBody;

/// Timeout of a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Timeout of an answer. It is longer than the server's own deadline, because the server's error explains more than a timeout.
const ANSWER: Duration = Duration::from_secs(45);

/// Timeout of an answer to a request that reads or writes much.
const LONG_ANSWER: Duration = Duration::from_secs(620);

/// A serving process, and the token for it.
#[derive(Clone)]
pub struct ApiClient {
    base: Url,
    token: Option<String>,
    http: Client,
    answer: Duration,
}

/// Parses the URL of an API. Plain HTTP is allowed only on this machine, because it would expose the token.
pub(super) fn url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    let plain =
        url.has_host() && url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    match url.scheme() {
        "https" if plain => Ok(url),
        "http" if plain && is_loopback(&url) => Ok(url),
        "http" if plain => Err("must be https:// beyond this machine: a token in clear text protects nothing".into()),
        _ => Err("must be an http:// or https:// URL with a host and without user, password and query".into()),
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
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
        Ok(Self { base, token, http, answer: ANSWER })
    }

    /// The same client, for requests that read or write much.
    #[must_use]
    pub fn patient(self) -> Self {
        Self { answer: LONG_ANSWER, ..self }
    }

    /// Sends `GET /api/v1/…` with the request's fields as query. The segments of the path are given unescaped.
    ///
    /// # Errors
    /// A [`Failure`] with the URL, the status and the answer.
    pub async fn get<T: DeserializeOwned>(&self, path: &[&str], request: &impl Serialize) -> Result<T, Failure> {
        let mut url = self.at(path);
        fill(&mut url, request)?;
        self.ask(Method::GET, url, None).await
    }

    /// Sends `POST /api/v1/…` with the request's fields and the reason as body.
    pub async fn post<T: DeserializeOwned>(&self, path: &[&str], request: &impl Serialize, reason: &str) -> Result<T, Failure> {
        let mut body = fields(request)?;
        body.insert("reason".into(), reason.into());
        self.ask(Method::POST, self.at(path), Some(body)).await
    }

    /// Sends `DELETE /api/v1/…` with the request's fields and the reason as query.
    pub async fn delete<T: DeserializeOwned>(&self, path: &[&str], request: &impl Serialize, reason: &str) -> Result<T, Failure> {
        let mut url = self.at(path);
        fill(&mut url, request)?;
        url.query_pairs_mut().append_pair("reason", reason);
        self.ask(Method::DELETE, url, None).await
    }

    /// The failure of work that continued after the answer; it has the exit code of an answer with this status.
    pub fn failure(status: u16, message: &str) -> Failure {
        Failure::of(exit(status), message)
    }

    fn at(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["api", "v1"]).extend(path);
        }
        url
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, url: Url, body: Option<Map<String, Value>>) -> Result<T, Failure> {
        let mut request = self.http.request(method, url.clone()).timeout(self.answer);
        if let Some(body) = &body {
            request = request.json(body);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answered = async {
            let answer = request.send().await.map_err(reqwest::Error::without_url)?;
            Ok::<_, reqwest::Error>((answer.status(), answer.bytes().await.map_err(reqwest::Error::without_url)?))
        };
        let answered = answered.await.with_context(|| format!("no answer from {url}"));
        let (status, body) = answered.map_err(|error| Failure::new(Exit::Unreachable, error))?;
        if !status.is_success() {
            return Err(refused(&url, status, &body));
        }
        let not_understood = || format!("{url} answers what this version does not understand; is it of the same version?");
        serde_json::from_slice(&body).with_context(not_understood).map_err(|error| Failure::new(Exit::Unreachable, error))
    }
}

/// Adds the request's fields to the query in the server's notation; omits null fields.
fn fill(url: &mut Url, request: &impl Serialize) -> Result<(), Failure> {
    for (name, value) in fields(request)? {
        match value {
            Value::Null => continue,
            Value::String(text) => url.query_pairs_mut().append_pair(&name, &text),
            other => url.query_pairs_mut().append_pair(&name, &other.to_string()),
        };
    }
    Ok(())
}

/// The fields of a request; empty for `()`.
fn fields(request: &impl Serialize) -> Result<Map<String, Value>, Failure> {
    match serde_json::to_value(request) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Ok(Map::new()),
        Err(error) => Err(Failure::new(Exit::Internal, error)),
    }
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
        for right in ["http://127.0.0.1:8090", "http://localhost:1/", "http://[::1]:8090", "https://tallyline.example/behind/"] {
            assert!(url(right).is_ok(), "{right}");
        }
        for wrong in ["http://10.0.0.1", "http://tallyline.example", "https://u:p@h", "https://h?x=1", "ftp://h", "127.0.0.1:8090", "x"] {
            assert!(url(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn paths_are_escaped_and_queries_hold_what_is_there() {
        let client = ApiClient::new(url("https://h/behind/").unwrap(), None).unwrap();
        let mut at = client.at(&["events", "a/b:c?%", "proof"]);
        assert_eq!(at.as_str(), "https://h/behind/api/v1/events/a%2Fb:c%3F%25/proof");
        fill(&mut at, &serde_json::json!({ "a": "x y&z", "b": 3, "c": null, "d": true })).unwrap();
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
            let failure = refused(&at, StatusCode::from_u16(status).unwrap(), br#"{"message":"why","field":"which"}"#);
            assert_eq!(failure.exit, exit, "{status}");
            let text = failure.error.to_string();
            assert!(text.contains("https://h/ answers") && text.contains(&status.to_string()) && text.ends_with("which: why"), "{text}");
        }
        assert!(refused(&at, StatusCode::BAD_GATEWAY, b"<html>").error.to_string().contains("none of Tallyline's"));
    }
}
