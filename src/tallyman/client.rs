//! One request to Tallyman. It does not retry: the publisher decides when to send again.

use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use uuid::Uuid;

use super::SendError;
use super::answer::{Answer, cut};

/// The client does not read a longer answer.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// The time limit of [`TallymanClient::reach`].
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// Address and timeout.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// The full URL of the ingest endpoint.
    pub url: String,
    /// For the whole request, including its answer. coderd uses 30 seconds.
    pub request_timeout: Duration,
}

impl ClientSettings {
    /// Sends to `url` with coderd's own timeout.
    pub fn new(url: impl Into<String>) -> Self {
        ClientSettings { url: url.into(), request_timeout: Duration::from_secs(30) }
    }
}

/// Why a client cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Not an `http` or `https` URL.
    #[error("{0:?} is not an http or https URL")]
    Url(String),
    /// For example, an unusable TLS library.
    #[error("the HTTP client cannot be created: {0}")]
    Client(String),
}

#[derive(Clone, Debug)]
pub struct TallymanClient {
    http: reqwest::Client,
    url: Url,
}

#[derive(Deserialize)]
struct Failure {
    message: String,
}

impl TallymanClient {
    /// Creates an idle client.
    pub fn new(settings: &ClientSettings) -> Result<Self, SettingsError> {
        let url = Url::parse(&settings.url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| SettingsError::Url(settings.url.clone()))?;
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("tallyline/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .timeout(settings.request_timeout)
            // One connection for each request. If the server closed a kept connection, the client
            // could not distinguish that from an accepted request without an answer.
            .pool_max_idle_per_host(0);
        if is_loopback(&url) {
            http = http.no_proxy();
        }
        let http = http.build().map_err(|error| SettingsError::Client(causes(&error)))?;
        Ok(TallymanClient { http, url })
    }

    /// Tallyman's address: scheme, host and port.
    #[must_use]
    pub fn address(&self) -> String {
        self.url.origin().ascii_serialization()
    }

    /// Checks that a server answers. It sends no license and no event, so any answer is enough.
    ///
    /// # Errors
    /// [`SendError::Unreachable`] or [`SendError::Unanswered`].
    pub async fn reach(&self) -> Result<(), SendError> {
        self.http
            .head(self.url.clone())
            .timeout(REACH_TIMEOUT)
            .send()
            .await
            .map(|_| ())
            .map_err(|error| unanswered(&error))
    }

    /// Sends one request: `body` from [`request_body`](super::request_body), under the license and
    /// for the deployment.
    ///
    /// # Errors
    /// No verdicts came back; [`SendError::may_have_been_accepted`] returns whether the vendor may
    /// have accepted the events.
    pub async fn ingest(
        &self,
        license_jwt: &str,
        deployment_id: Uuid,
        body: Vec<u8>,
    ) -> Result<Answer, SendError> {
        let request = self
            .http
            .post(self.url.clone())
            .headers(headers(license_jwt, deployment_id)?)
            .body(body);
        let response = request.send().await.map_err(|error| unanswered(&error))?;
        let status = response.status();
        let body = read(response, license_jwt).await?;
        match (status, body) {
            (StatusCode::OK, Some(body)) => Answer::parse(&body),
            (StatusCode::OK, None) => Err(SendError::Undecodable(too_long())),
            (_, body) => {
                Err(SendError::Status { status: status.as_u16(), message: failure_message(body) })
            }
        }
    }
}

fn headers(license_jwt: &str, deployment_id: Uuid) -> Result<HeaderMap, SendError> {
    let mut license =
        HeaderValue::from_str(license_jwt).map_err(|_| SendError::LicenseNotAHeader)?;
    if license.is_empty() {
        return Err(SendError::LicenseNotAHeader);
    }
    license.set_sensitive(true);
    let deployment =
        HeaderValue::from_str(&deployment_id.to_string()).expect("a UUID is a header value");
    let mut headers = HeaderMap::new();
    headers.insert("coder-license-key", license);
    headers.insert("coder-deployment-id", deployment);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(headers)
}

/// Reads the whole body, and hides the license if the vendor repeats it. None: it is too long.
async fn read(
    mut response: reqwest::Response,
    license_jwt: &str,
) -> Result<Option<Vec<u8>>, SendError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unanswered(&error))? {
        if body.len().saturating_add(chunk.len()) > MAX_ANSWER_BYTES {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    match std::str::from_utf8(&body) {
        Ok(text) if text.contains(license_jwt) => {
            Ok(Some(text.replace(license_jwt, "***").into_bytes()))
        }
        _ => Ok(Some(body)),
    }
}

fn failure_message(body: Option<Vec<u8>>) -> String {
    let reason = match body {
        Some(body) => match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => return cut(&failure.message),
            Err(error) => error.to_string(),
        },
        None => too_long(),
    };
    format!("could not decode error response body: {}", cut(&reason))
}

fn too_long() -> String {
    format!("longer than {MAX_ANSWER_BYTES} bytes")
}

fn unanswered(error: &reqwest::Error) -> SendError {
    if error.is_connect() {
        SendError::Unreachable(causes(error))
    } else {
        SendError::Unanswered(causes(error))
    }
}

/// The innermost causes contain the reason; the outer ones repeat the URL.
fn causes(error: &reqwest::Error) -> String {
    let mut text = if error.is_timeout() { "timed out".to_owned() } else { String::new() };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    if text.is_empty() { "request failed".to_owned() } else { cut(&text) }
}

fn is_loopback(url: &Url) -> bool {
    let Some(host) = url.host_str() else { return false };
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
