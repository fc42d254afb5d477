//! Limits for slow or silent clients.

use std::time::Duration;

use tallyline::api::Limits;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{SOON, Site};

const HEADER: Duration = Duration::from_secs(2);

/// A connection on which these bytes were sent.
async fn connect_and_send(address: &str, words: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address.trim_start_matches("http://")).await.unwrap();
    stream.write_all(words.as_bytes()).await.unwrap();
    stream
}

/// All bytes until the server closes the connection.
async fn read_all(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    let read =
        tokio::time::timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("closed in time");
    read.unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn a_client_that_does_not_end_its_header_is_cut_off_on_both_listeners() {
    let site = Site::new().await;
    let process = site.process_with(|settings, _| settings.limits.header = HEADER).await;
    for address in [&process.api, &process.metrics] {
        let half =
            connect_and_send(address, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Half: ").await;
        let silent = connect_and_send(address, "").await;
        let idle =
            connect_and_send(address, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        let (half, silent, idle) = tokio::join!(read_all(half), read_all(silent), read_all(idle));
        assert_eq!((half.as_str(), silent.as_str()), ("", ""));
        assert!(
            idle.starts_with("HTTP/1.1 200 OK\r\n") && idle.ends_with("{\"alive\":true}"),
            "{idle}"
        );
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_until_one_ends() {
    let site = Site::new().await;
    let process = site
        .process_with(|settings, _| settings.limits = Limits { connections: 2, header: HEADER })
        .await;
    let open = [
        connect_and_send(&process.api, "GET ").await,
        connect_and_send(&process.api, "GET ").await,
    ];
    let mut third = connect_and_send(
        &process.api,
        "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    .await;
    let early = tokio::time::timeout(HEADER / 4, third.readable()).await;
    assert!(early.is_err(), "more connections than the limit were taken");
    let mut first = [0];
    tokio::time::timeout(SOON, third.read_exact(&mut first))
        .await
        .expect("answered in time")
        .unwrap();
    assert!(read_all(third).await.starts_with("TTP/1.1 200 OK\r\n"));
    drop(open);
}
