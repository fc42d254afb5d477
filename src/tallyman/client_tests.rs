//! Tests the client against servers that write fixed bytes. `tests/tallyman.rs` tests it with the
//! simulated Tallyman.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::tallyman::Verdict;

const LICENSE: &str = "eyJhbGciOiJFZERTQSJ9.eyJzZWNyZXQiOjF9.c2lnbmF0dXJl";

/// Reads one request, answers it with `answer` and closes; returns the request.
async fn serve_once(answer: Vec<u8>) -> (TallymanClient, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/api/v1/events/ingest", listener.local_addr().expect("bound"));
    let served = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut request = Vec::new();
        while !request.ends_with(b"BODY") {
            let mut chunk = [0; 4096];
            let read = stream.read(&mut chunk).await.expect("the request");
            assert_ne!(read, 0, "the request ends with its body");
            request.extend_from_slice(&chunk[..read]);
        }
        // The client may stop reading before the server has written all.
        let _ = stream.write_all(&answer).await;
        let _ = stream.shutdown().await;
        String::from_utf8(request).expect("UTF-8")
    });
    (TallymanClient::new(&ClientSettings::new(url)).expect("a client"), served)
}

fn http(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn send(answer: Vec<u8>) -> Result<Answer, SendError> {
    let (client, _served) = serve_once(answer).await;
    client.ingest(LICENSE, Uuid::from_u128(7), b"BODY".to_vec()).await
}

#[tokio::test]
async fn the_headers_are_those_that_tallyman_checks() {
    let (client, served) = serve_once(http("200 OK", "{}")).await;
    client.ingest(LICENSE, Uuid::from_u128(0xabc), b"BODY".to_vec()).await.expect("an answer");
    let request = served.await.expect("served").to_lowercase();
    assert!(request.starts_with("post /api/v1/events/ingest http/1.1\r\n"), "{request}");
    for header in [
        format!("coder-license-key: {}", LICENSE.to_lowercase()),
        "coder-deployment-id: 00000000-0000-0000-0000-000000000abc".to_owned(),
        format!("user-agent: tallyline/{}", env!("CARGO_PKG_VERSION")),
        "content-type: application/json".to_owned(),
    ] {
        assert!(request.contains(&format!("\r\n{header}\r\n")), "{header} in {request}");
    }
}

#[tokio::test]
async fn only_200_is_success() {
    for status in [201, 202, 204, 301, 307, 400, 401, 500, 503] {
        let error = send(http(&format!("{status} X"), r#"{"message":"refused"}"#))
            .await
            .expect_err("a failure");
        // 204 has no body by definition.
        let start = if status == 204 {
            "unexpected status code 204, error: could not decode error response body: ".to_owned()
        } else {
            format!("unexpected status code {status}, error: refused")
        };
        assert!(error.to_string().starts_with(&start), "{error}");
        assert!(matches!(error, SendError::Status { status: got, .. } if got == status));
        assert_eq!(error.may_have_been_accepted(), !(400..500).contains(&status), "{status}");
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let answer =
        b"HTTP/1.1 307 X\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n".to_vec();
    let error = send(answer).await.expect_err("a failure");
    assert!(matches!(error, SendError::Status { status: 307, .. }), "{error:?}");
}

#[tokio::test]
async fn an_error_without_a_message_reports_that() {
    let error = send(http("502 Bad Gateway", "<html>")).await.expect_err("a failure").to_string();
    assert!(
        error.starts_with(
            "unexpected status code 502, error: could not decode error response body: "
        ),
        "{error}"
    );
}

#[tokio::test]
async fn an_undecodable_200_may_have_been_accepted() {
    let error = send(http("200 OK", "{\"accepted_events\":[{}]}")).await.expect_err("a failure");
    assert!(matches!(error, SendError::Undecodable(_)), "{error:?}");
    assert!(error.to_string().starts_with("decode response body: "), "{error}");
    assert!(error.may_have_been_accepted());
}

#[tokio::test]
async fn an_endless_answer_is_not_read() {
    let mut answer = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    answer.resize(MAX_ANSWER_BYTES + 4096, b' ');
    let error = send(answer).await.expect_err("a failure");
    assert_eq!(
        error.to_string(),
        format!("decode response body: longer than {MAX_ANSWER_BYTES} bytes")
    );
}

#[tokio::test]
async fn a_cut_answer_is_unanswered() {
    for answer in
        [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"accepted_events\":["]
    {
        let error = send(answer.to_vec()).await.expect_err("a failure");
        assert!(matches!(error, SendError::Unanswered(_)), "{error:?}");
        assert!(error.may_have_been_accepted());
    }
}

#[tokio::test]
async fn a_silent_server_times_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("bound"));
    let settings = ClientSettings { url, request_timeout: Duration::from_millis(50) };
    let client = TallymanClient::new(&settings).expect("a client");
    let error = client.ingest(LICENSE, Uuid::nil(), Vec::new()).await.expect_err("a failure");
    assert!(
        matches!(&error, SendError::Unanswered(cause) if cause.starts_with("timed out")),
        "{error:?}"
    );
}

#[tokio::test]
async fn without_a_server_nothing_is_accepted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("bound"));
    drop(listener);
    let client = TallymanClient::new(&ClientSettings::new(url)).expect("a client");
    let error = client.ingest(LICENSE, Uuid::nil(), Vec::new()).await.expect_err("a failure");
    assert!(matches!(error, SendError::Unreachable(_)), "{error:?}");
    assert!(!error.may_have_been_accepted());
}

#[tokio::test]
async fn the_license_is_in_no_message() {
    let padding = "x".repeat(980);
    let error = send(http("401 X", &format!(r#"{{"message":"{padding} bad license {LICENSE}"}}"#)))
        .await
        .expect_err("a failure");
    assert!(error.to_string().contains("bad license *"), "{error}");
    assert!(!format!("{error:?}").contains(&LICENSE[..10]), "{error:?}");

    let body = format!(
        r#"{{"rejected_events":[{{"id":"a","message":"not under {LICENSE}","permanent":true}}]}}"#
    );
    let answer = send(http("200 OK", &body)).await.expect("an answer");
    assert_eq!(
        answer.verdicts(["a"]).of_sent[0].1,
        Verdict::RefusedPermanently("not under ***".to_owned())
    );

    let (client, _served) = serve_once(Vec::new()).await;
    let error = client.ingest("two\nparts", Uuid::nil(), Vec::new()).await.expect_err("a failure");
    assert_eq!(error, SendError::LicenseNotAHeader);
    assert!(!format!("{client:?} {error:?}").contains("parts"));
}

#[test]
fn only_http_urls_make_a_client() {
    for url in ["", "tallyman", "ftp://host/", "/api/v1/events/ingest"] {
        assert!(
            matches!(TallymanClient::new(&ClientSettings::new(url)), Err(SettingsError::Url(_))),
            "{url}"
        );
    }
    assert!(
        TallymanClient::new(&ClientSettings::new(
            "https://tallyman-prod.coder.com/api/v1/events/ingest"
        ))
        .is_ok()
    );
}
