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

/// Milliseconds from the instant at which each request is due until its answer, at a constant rate.
/// A late request thus counts its delay, also where the client is late.
pub fn latencies(server: SocketAddr, path: &str, rate: f64, length: Duration) -> Result<Vec<f64>> {
    let every = Duration::from_secs_f64(CONNECTIONS as f64 / rate);
    let begun = Instant::now();
    let answered: Result<Vec<Vec<f64>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                let first = begun + every * number as u32 / CONNECTIONS as u32;
                scope.spawn(move || ask_every(server, path, first, every, begun + length))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a client thread panicked"))?)
            .collect()
    });
    Ok(answered?.concat())
}

/// Asks on one connection, at each due instant until `end`.
fn ask_every(
    server: SocketAddr,
    path: &str,
    first: Instant,
    every: Duration,
    end: Instant,
) -> Result<Vec<f64>> {
    let (mut connection, request) = connect(server, path)?;
    let (mut due, mut milliseconds) = (first, Vec::new());
    while due < end {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        connection.get_mut().write_all(request.as_bytes())?;
        read_answer(&mut connection)?;
        milliseconds.push(due.elapsed().as_secs_f64() * 1_000.0);
        due += every;
    }
    Ok(milliseconds)
}

fn connect(server: SocketAddr, path: &str) -> Result<(BufReader<TcpStream>, String)> {
    let connection = TcpStream::connect(server)?;
    connection.set_nodelay(true)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\n\r\n");
    Ok((BufReader::new(connection), request))
}

/// Asks on one connection, one request after another. Returns the number of answers.
fn ask_until(server: SocketAddr, path: &str, end: Instant) -> Result<u64> {
    let (mut connection, request) = connect(server, path)?;
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
