//! Tallyline's client and the simulated Tallyman: the whole exchange over a real connection.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline::event::UsageQuantity;
use tallyline::tallyman::{
    ClientSettings, OutgoingEvent, SendError, TallymanClient, Verdict, request_body,
};
use tallyline_sim::tallyman::{
    Behaviour, Books, Config, CutMoment, Cuts, EventRule, Outcome, ServerErrors, Switches, Tallyman,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const LICENSE: &str = "header.claims.signature";
const DEPLOYMENT: Uuid = Uuid::from_u128(0xd);

struct Exchange {
    vendor: Tallyman,
    client: TallymanClient,
    clock: Clock,
    stop: CancellationToken,
}

fn start_time() -> DateTime<Utc> {
    "2025-08-01T12:00:00Z".parse().expect("a time")
}

fn known() -> Config {
    Config {
        license_keys: vec![LICENSE.to_owned()],
        deployment_ids: vec![DEPLOYMENT],
        ..Config::default()
    }
}

impl Exchange {
    async fn start(config: Config) -> Self {
        let (clock, stop) = (Clock::manual(start_time()), CancellationToken::new());
        let vendor = Tallyman::start(config, clock.clone(), stop.clone()).await.expect("started");
        let client =
            TallymanClient::new(&ClientSettings::new(vendor.ingest_url())).expect("a client");
        Exchange { vendor, client, clock, stop }
    }

    async fn with(switches: Switches) -> Self {
        Self::start(Config { switches, ..known() }).await
    }

    async fn send(&self, ids: &[&str]) -> Result<Vec<Verdict>, SendError> {
        let events: Vec<_> = ids.iter().map(|id| event(id, start_time())).collect();
        let answer = self.client.ingest(LICENSE, DEPLOYMENT, request_body(&events)).await?;
        let verdicts = answer.verdicts(ids.iter().copied());
        assert_eq!(verdicts.not_sent, 0);
        Ok(verdicts.of_sent.into_iter().map(|(_, verdict)| verdict).collect())
    }

    fn books(&self) -> Books {
        self.vendor.books()
    }

    fn outcomes(&self) -> Vec<(Outcome, bool)> {
        self.books()
            .deliveries
            .iter()
            .map(|delivery| (delivery.outcome, delivery.answered))
            .collect()
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        reqwest::Client::builder()
            .no_proxy()
            .build()
            .expect("a client")
            .get(self.url(path))
            .send()
            .await
            .expect("an answer")
    }

    async fn put_switches(&self, json: &str) -> u16 {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        client
            .put(self.url("/sim/switches"))
            .body(json.to_owned())
            .send()
            .await
            .expect("an answer")
            .status()
            .as_u16()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.vendor.addr)
    }
}

fn event(id: &str, created_at: DateTime<Utc>) -> OutgoingEvent {
    OutgoingEvent::new(id, UsageQuantity::ManagedAgents(1), created_at).expect("valid")
}

fn rule(behaviour: Behaviour, id: &str) -> EventRule {
    EventRule { behaviour, ids: vec![id.to_owned()], fraction: 0.0, until: None, times: Some(1) }
}

#[tokio::test]
async fn an_accepted_event_is_billed_once_however_often_it_comes() {
    let exchange = Exchange::start(known()).await;
    assert_eq!(exchange.send(&["a", "b", "a"]).await, Ok(vec![Verdict::Accepted; 3]));
    assert_eq!(exchange.send(&["a"]).await, Ok(vec![Verdict::Accepted]));
    let books = exchange.books();
    assert_eq!([books.times_billed(DEPLOYMENT, "a"), books.times_billed(DEPLOYMENT, "b")], [1, 1]);
    assert_eq!(
        books.texts(DEPLOYMENT, "a"),
        vec![event("a", start_time()).to_json(); 3],
        "byte for byte the same"
    );
    assert_eq!(books.requests, 2);
}

#[tokio::test]
async fn an_id_is_forgotten_after_its_time_and_then_billed_again() {
    let exchange = Exchange::start(Config { remember: TimeDelta::hours(1), ..known() }).await;
    let tick = TimeDelta::microseconds(1);
    for (after, times) in
        [(TimeDelta::zero(), 1), (TimeDelta::hours(1) - tick, 1), (TimeDelta::hours(1), 2)]
    {
        exchange.clock.set(start_time() + after);
        assert_eq!(exchange.send(&["a"]).await, Ok(vec![Verdict::Accepted]));
        assert_eq!(exchange.books().times_billed(DEPLOYMENT, "a"), times);
    }
    assert_eq!(
        exchange.books().billed[0].billed_at,
        [start_time(), start_time() + TimeDelta::hours(1)]
    );
}

#[tokio::test]
async fn an_event_older_than_30_days_is_refused_for_ever() {
    let exchange = Exchange::start(known()).await;
    exchange.clock.set(start_time() + TimeDelta::days(30));
    assert_eq!(exchange.send(&["a"]).await, Ok(vec![Verdict::Accepted]));
    exchange.clock.set(start_time() + TimeDelta::days(30) + TimeDelta::microseconds(1));
    let verdicts = exchange.send(&["a", "b"]).await.expect("an answer");
    assert!(
        verdicts.iter().all(|verdict| matches!(verdict, Verdict::RefusedPermanently(_))),
        "{verdicts:?}"
    );
    assert_eq!(
        exchange.outcomes(),
        [(Outcome::Billed, true), (Outcome::TooOld, true), (Outcome::TooOld, true)]
    );
}

#[tokio::test]
async fn events_are_refused_and_left_out_according_to_the_switches() {
    let exchange = Exchange::with(Switches {
        events: vec![
            rule(Behaviour::RefuseForNow, "now"),
            rule(Behaviour::RefuseForEver, "ever"),
            rule(Behaviour::Omit, "omitted"),
            rule(Behaviour::OmitThoughTaken, "taken"),
        ],
        ..Switches::default()
    })
    .await;
    let ids = ["now", "ever", "plain", "omitted", "taken"];
    let first = exchange.send(&ids).await.expect("an answer");
    assert!(
        matches!(first[0], Verdict::RefusedForNow(_))
            && matches!(first[1], Verdict::RefusedPermanently(_)),
        "{first:?}"
    );
    assert_eq!(first[2..], [Verdict::Accepted, Verdict::LeftOut, Verdict::LeftOut]);
    assert_eq!(exchange.send(&ids).await, Ok(vec![Verdict::Accepted; 5]), "each rule holds once");
    assert!(ids.iter().all(|id| exchange.books().times_billed(DEPLOYMENT, id) == 1));
}

#[tokio::test]
async fn a_wrong_license_or_deployment_is_401_and_bills_nothing() {
    let exchange = Exchange::start(known()).await;
    let body = || request_body(&[event("a", start_time())]);
    for (license, deployment, named) in [
        ("other.license.key", DEPLOYMENT, "Coder-License-Key"),
        (LICENSE, Uuid::nil(), "Coder-Deployment-ID"),
    ] {
        let error = exchange.client.ingest(license, deployment, body()).await.expect_err("refused");
        assert_eq!(
            error,
            SendError::Status { status: 401, message: format!("{named} is missing or wrong") }
        );
    }
    assert_eq!(
        (
            exchange.books().requests,
            exchange.books().deliveries.len(),
            exchange.books().billed.len()
        ),
        (2, 0, 0)
    );
}

#[tokio::test]
async fn a_bad_body_is_400_and_bills_nothing() {
    let exchange = Exchange::start(known()).await;
    let many: Vec<_> = (0..101).map(|n| event(&n.to_string(), start_time())).collect();
    for body in [b"{}".to_vec(), request_body(&many), b"{\"events\":[{}]}".to_vec()] {
        let error = exchange.client.ingest(LICENSE, DEPLOYMENT, body).await.expect_err("refused");
        assert!(matches!(error, SendError::Status { status: 400, .. }), "{error:?}");
        assert!(!error.may_have_been_accepted());
    }
    assert_eq!(exchange.books().billed, []);
    assert_eq!(
        exchange.client.ingest(LICENSE, DEPLOYMENT, request_body(&many[..100])).await.map(drop),
        Ok(())
    );
    assert_eq!(exchange.books().billed.len(), 100);
}

#[tokio::test]
async fn a_fault_of_the_server_may_or_may_not_have_taken_the_events() {
    for (after_accepting, expected) in
        [(false, (Outcome::RequestFailed, false)), (true, (Outcome::Billed, false))]
    {
        let errors = ServerErrors { status: 502, next: 1, fraction: 0.0, after_accepting };
        let exchange = Exchange::with(Switches { errors, ..Switches::default() }).await;
        let error = exchange.send(&["a"]).await.expect_err("a fault");
        assert_eq!(
            error,
            SendError::Status { status: 502, message: "internal server error".to_owned() }
        );
        assert!(error.may_have_been_accepted());
        assert_eq!(exchange.outcomes(), [expected]);
        assert_eq!(exchange.send(&["a"]).await, Ok(vec![Verdict::Accepted]));
        assert_eq!(exchange.books().times_billed(DEPLOYMENT, "a"), 1);
    }
}

#[tokio::test]
async fn a_cut_connection_is_unanswered_whether_or_not_the_events_were_taken() {
    for (moment, billed) in [(CutMoment::BeforeReading, 0), (CutMoment::AfterAccepting, 1)] {
        let cuts = Cuts { moment, next: 1, fraction: 0.0 };
        let exchange = Exchange::with(Switches { cuts, ..Switches::default() }).await;
        let error = exchange.send(&["a"]).await.expect_err("cut");
        assert!(matches!(error, SendError::Unanswered(_)), "{error:?}");
        assert_eq!(exchange.books().times_billed(DEPLOYMENT, "a"), billed, "{moment:?}");
        assert!(exchange.books().deliveries.iter().all(|delivery| !delivery.answered));
        assert_eq!(exchange.send(&["a"]).await, Ok(vec![Verdict::Accepted]));
        assert_eq!(exchange.books().times_billed(DEPLOYMENT, "a"), 1);
        assert_eq!(exchange.books().requests, 2, "nothing sends again by itself");
    }
}

#[tokio::test]
async fn the_client_abandons_a_slow_answer() {
    let exchange = Exchange::with(Switches { latency_ms: 60_000, ..Switches::default() }).await;
    let hurried = ClientSettings {
        url: exchange.vendor.ingest_url(),
        request_timeout: Duration::from_millis(100),
    };
    let client = TallymanClient::new(&hurried).expect("a client");
    let error = client.ingest(LICENSE, DEPLOYMENT, request_body(&[])).await.expect_err("too slow");
    assert!(matches!(error, SendError::Unanswered(_)), "{error:?}");
    // Stopping does not wait for the latency.
    exchange.stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), exchange.vendor.stopped())
        .await
        .expect("in time")
        .expect("stopped");
}

#[tokio::test]
async fn the_books_survive_the_process_and_a_torn_last_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("books.jsonl");
    let config = || Config { books: Some(file.clone()), ..known() };
    // requests in flight are those of one process
    let kept = |books: Books| Books { most_in_flight: 0, ..books };
    let before = {
        // It is never stopped: the file now has the same content as after a kill.
        let exchange = Exchange::start(config()).await;
        exchange.send(&["a", "b"]).await.expect("an answer");
        exchange.send(&["a"]).await.expect("an answer");
        exchange.books()
    };
    let text = std::fs::read_to_string(&file).expect("the books");
    assert_eq!(text.lines().count(), 2);
    std::fs::write(&file, format!("{text}{{\"request\":3,\"deli")).expect("written");

    let exchange = Exchange::start(config()).await;
    assert_eq!(exchange.books(), kept(before));
    assert_eq!(exchange.send(&["a", "c"]).await, Ok(vec![Verdict::Accepted; 2]));
    assert_eq!(exchange.books().times_billed(DEPLOYMENT, "a"), 1, "still remembered");
    let again = Exchange::start(config()).await;
    assert_eq!(again.books(), kept(exchange.books()));
}

#[tokio::test]
async fn the_control_api_shows_the_books_and_sets_the_switches() {
    let exchange = Exchange::start(known()).await;
    exchange.send(&["a"]).await.expect("an answer");
    let books: Books = exchange.get("/sim/books").await.json().await.expect("books");
    assert_eq!(books, exchange.books());

    assert_eq!(exchange.put_switches(r#"{"errors":{"next":1}}"#).await, 204);
    let switches: Switches = exchange.get("/sim/switches").await.json().await.expect("switches");
    assert_eq!(switches.errors, ServerErrors { next: 1, ..ServerErrors::default() });
    assert!(exchange.send(&["a"]).await.is_err());
    assert_eq!(exchange.put_switches(r#"{"erors":{"next":1}}"#).await, 400);
    assert_eq!(exchange.put_switches(r#"{"errors":{"status":200}}"#).await, 400);
    assert!(exchange.send(&["a"]).await.is_ok(), "refused switches change nothing");
    assert_eq!(exchange.get("/elsewhere").await.status().as_u16(), 404);
    assert_eq!(exchange.get("/api/v1/events/ingest").await.status().as_u16(), 405);
}

#[tokio::test]
async fn only_loopback_is_listened_on() {
    let open = Config { listen: "0.0.0.0:0".parse().expect("an address"), ..known() };
    assert!(
        Tallyman::start(open, Clock::manual(start_time()), CancellationToken::new()).await.is_err()
    );
}
