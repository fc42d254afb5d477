//! A bare axum server, and a client that asks as fast as it is answered.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use serde::{Deserialize, Serialize};

/// Connections of the client, each with a thread.
const CONNECTIONS: usize = 8;

/// A server that returns the same bytes for each request.
#[derive(Serialize, Deserialize)]
pub struct Bare {
    pub listen: SocketAddr,
    pub body: String,
}

/// Serves until it is killed.
pub async fn serve(bare: &Bare) -> Result<()> {
    let body = Bytes::from(bare.body.clone());
    let answer = async move || ([(CONTENT_TYPE, "application/json")], body);
    let listener = tokio::net::TcpListener::bind(bare.listen).await?;
    Ok(axum::serve(listener, Router::new().fallback(answer)).await?)
}

/// Requests a second that the server answers. The client's threads share the machine with it.
pub fn requests_a_second(server: SocketAddr, path: &str, length: Duration) -> Result<f64> {
    let begun = Instant::now();
    let answered: Result<Vec<u64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|_| scope.spawn(|| ask_until(server, path, begun + length)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a client thread panicked"))?)
            .collect()
    });
    Ok(answered?.iter().sum::<u64>() as f64 / begun.elapsed().as_secs_f64())
}

/// Asks on one connection, one request after another. Returns the number of answers.
fn ask_until(server: SocketAddr, path: &str, end: Instant) -> Result<u64> {
    let mut connection = BufReader::new(TcpStream::connect(server)?);
    connection.get_ref().set_nodelay(true)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\n\r\n");
    let mut answers = 0;
    while Instant::now() < end {
        connection.get_mut().write_all(request.as_bytes())?;
        read_answer(&mut connection)?;
        answers += 1;
    }
    Ok(answers)
}

fn read_answer(connection: &mut BufReader<TcpStream>) -> Result<()> {
    let (mut line, mut length) = (String::new(), None);
    connection.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200 "), "answer {line:?}");
    loop {
        line.clear();
        connection.read_line(&mut line)?;
        if line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(value.trim().parse::<usize>()?);
        }
    }
    let mut body = vec![0; length.context("the answer has a length")?];
    Ok(connection.read_exact(&mut body)?)
}
