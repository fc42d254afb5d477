//! The cost of one event before it reaches the ledger.

use std::hint::black_box;
use std::time::{Duration, Instant};

use tallyline::event::{self, Event, Message};

use super::events;

const DIFFERENT: u32 = 10_000;
const FOR: Duration = Duration::from_secs(2);

/// Prints nanoseconds per event, and the size of events.
pub fn measure() {
    let events: Vec<Event> = (0..DIFFERENT).map(events::event).collect();
    let messages: Vec<Message> = events.iter().map(Event::to_message).collect();
    let payloads: Vec<usize> =
        messages.iter().map(|message| message.payload.as_ref().map_or(0, Vec::len)).collect();
    println!(
        "payload   {:>6} bytes on average, at most {}",
        mean(&payloads),
        payloads.iter().max().unwrap_or(&0)
    );
    println!(
        "parse     {:>6} ns an event",
        nanoseconds(&messages, |message| event::parse(message).is_ok())
    );
    println!("digest    {:>6} ns an event", nanoseconds(&events, Event::digest));
}

fn mean(numbers: &[usize]) -> usize {
    numbers.iter().sum::<usize>() / numbers.len()
}

fn nanoseconds<T, R>(items: &[T], work: impl Fn(&T) -> R) -> u128 {
    let begun = Instant::now();
    let mut done = 0;
    while begun.elapsed() < FOR {
        for item in items {
            black_box(work(black_box(item)));
        }
        done += items.len() as u128;
    }
    begun.elapsed().as_nanos() / done
}
