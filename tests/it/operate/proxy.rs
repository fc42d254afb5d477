//! A TCP proxy before a server: a test can interrupt the network and restore it.

// The fault harness also uses it: each binary uses some of its methods.
#![allow(dead_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, MutexGuard, watch};
use tokio_util::sync::CancellationToken;

use crate::support::ports::free_port;
use crate::support::setting;

/// PostgreSQL's ReadyForQuery with status T: it waits for its client within a transaction.
const WAITS_IN_TRANSACTION: &[u8] = b"Z\0\0\0\x05T";

/// A proxy's address and its server. It listens only after [`Proxy::open`].
pub struct Proxy {
    pub address: SocketAddr,
    server: String,
    state: Arc<State>,
    listening: Option<CancellationToken>,
}

struct State {
    /// No bytes move in either direction; new connections are accepted but lead nowhere.
    frozen: watch::Sender<bool>,
    /// A change makes all open connections silent; neither side is informed.
    losses: watch::Sender<u64>,
    /// A change cuts all open connections.
    cuts: watch::Sender<u64>,
    /// Bytes from the server.
    bytes: AtomicU64,
    connections: AtomicUsize,
    /// All connections ever accepted.
    accepted: AtomicUsize,
    /// The number of bytes from the server after which the proxy cuts by itself.
    cut_at: AtomicU64,
    cut_itself: AtomicBool,
    /// After this number of ReadyForQuery with status T, the proxy freezes by itself.
    freeze_after: AtomicU64,
}

/// The broker names one port to the clients of its proxied listener: one test at a time.
pub async fn kafka() -> (MutexGuard<'static, ()>, Proxy) {
    static IN_USE: Mutex<()> = Mutex::const_new(());
    let turn = IN_USE.lock().await;
    let address = setting("TALLYLINE_TEST_KAFKA_PROXY").parse().expect("an address");
    (turn, Proxy::at(address, setting("TALLYLINE_TEST_KAFKA_BEHIND_PROXY")))
}

impl Proxy {
    /// A proxy to the server of a database, and the database's URL through it. The URL contains a
    /// password, which must stay hidden.
    pub fn to_database(url: &str) -> (Proxy, String) {
        let (head, rest) = url.split_once("@").expect("a user");
        let (server, name) = rest.split_once('/').expect("a database");
        let proxy = Proxy::to(server);
        let url = format!("{head}:hunter2@{}/{name}", proxy.address);
        (proxy, url)
    }

    pub fn to(server: &str) -> Proxy {
        Proxy::at((Ipv4Addr::LOCALHOST, free_port()).into(), server.to_owned())
    }

    fn at(address: SocketAddr, server: String) -> Proxy {
        let state = State {
            frozen: watch::Sender::new(false),
            losses: watch::Sender::new(0),
            cuts: watch::Sender::new(0),
            bytes: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
            accepted: AtomicUsize::new(0),
            cut_at: AtomicU64::new(u64::MAX),
            cut_itself: AtomicBool::new(false),
            freeze_after: AtomicU64::new(0),
        };
        Proxy { address, server, state: Arc::new(state), listening: None }
    }

    /// Starts to listen.
    pub async fn open(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("the proxy's port");
        let (server, state, stop) =
            (self.server.clone(), Arc::clone(&self.state), CancellationToken::new());
        self.listening = Some(stop.clone());
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                tokio::spawn(carry(client, server.clone(), Arc::clone(&state)));
            }
        }));
    }

    /// Ends all connections and stops listening.
    pub fn close(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.cancel();
        }
        self.cut();
    }

    /// Ends all connections, like a network fault. New ones are accepted.
    pub fn cut(&self) {
        self.state.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Ends all connections after this number of further bytes from the server: in the middle of a
    /// message.
    pub fn cut_after(&self, bytes: u64) {
        self.state.cut_itself.store(false, Ordering::SeqCst);
        self.state.cut_at.store(self.state.bytes.load(Ordering::SeqCst) + bytes, Ordering::SeqCst);
    }

    /// Whether the requested cut has happened.
    pub fn has_cut(&self) -> bool {
        self.state.cut_itself.load(Ordering::SeqCst)
    }

    /// Stops all traffic; neither side is informed.
    pub fn freeze(&self) {
        self.state.frozen.send_replace(true);
    }

    /// Freezes after PostgreSQL has sent ReadyForQuery with status T this many times. The client
    /// does not receive the last one.
    pub fn freeze_in_transaction(&self, times: u64) {
        self.state.freeze_after.store(times, Ordering::SeqCst);
    }

    pub fn is_frozen(&self) -> bool {
        *self.state.frozen.borrow()
    }

    pub fn thaw(&self) {
        self.state.freeze_after.store(0, Ordering::SeqCst);
        self.state.frozen.send_replace(false);
    }

    /// Like a server's host that is replaced at its address: open connections become silent, new
    /// ones work.
    pub fn lose(&self) {
        self.state.losses.send_modify(|losses| *losses += 1);
    }

    /// The number of connections accepted since the proxy was created, open or not.
    pub fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::SeqCst)
    }

    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.close();
    }
}

async fn carry(client: TcpStream, server: String, state: Arc<State>) {
    let mut cut = state.cuts.subscribe();
    let mut lost = state.losses.subscribe();
    let mut frozen = state.frozen.subscribe();
    let carried = pin!(async {
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        let Ok(server) = TcpStream::connect(server).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        tokio::select! {
            () = pass(&mut from_client, &mut to_server, &state, false) => {}
            () = pass(&mut from_server, &mut to_client, &state, true) => {}
        }
    });
    state.connections.fetch_add(1, Ordering::SeqCst);
    state.accepted.fetch_add(1, Ordering::SeqCst);
    tokio::select! {
        () = carried => {}
        _ = cut.changed() => {}
        // both ends stay open, because `carried` lives on
        _ = lost.changed() => { let _ = cut.changed().await; }
    }
    state.connections.fetch_sub(1, Ordering::SeqCst);
}

async fn pass(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    state: &State,
    of_server: bool,
) {
    let mut frozen = state.frozen.subscribe();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return };
        let bytes = if of_server {
            state.bytes.fetch_add(read as u64, Ordering::SeqCst) + read as u64
        } else {
            0
        };
        if of_server && buffer[..read].ends_with(WAITS_IN_TRANSACTION) {
            let counted =
                state
                    .freeze_after
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |times| times.checked_sub(1));
            if counted == Ok(1) {
                state.frozen.send_replace(true);
            }
        }
        if read == 0 || frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        if bytes >= state.cut_at.load(Ordering::SeqCst) {
            state.cut_at.store(u64::MAX, Ordering::SeqCst);
            state.cut_itself.store(true, Ordering::SeqCst);
            state.cuts.send_modify(|cuts| *cuts += 1);
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
