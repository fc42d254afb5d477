//! A mutator for bytes and some text. A token is a quoted string or a word, as in JSON, TOML,
//! headers and arguments.

use std::ops::Range;

use rand::Rng as _;
use rand::rngs::StdRng;

/// The longest mutation; more than any parser accepts.
const MOST_BYTES: usize = 300 * 1024;

/// Tokens that are difficult for parsers.
const TOKENS: &[&[u8]] = &[
    b"null",
    b"true",
    b"0",
    b"-0",
    b"-1",
    b"1.5",
    b"1e3",
    b"1e999",
    b"2147483648",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551615",
    b"18446744073709551616",
    b"NaN",
    b"{}",
    b"[]",
    b"[1]",
    b"{\"a\":1,\"a\":2}",
    b"\"\"",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"\"\\u0063ount\"",
    b"\"0001-01-01T00:00:00Z\"",
    b"\"1969-12-31T23:59:59.999999Z\"",
    b"\"1970-01-01T00:00:00Z\"",
    b"\"9999-12-31T23:59:59.999999Z\"",
    b"\"9999-12-31T23:59:59-23:59\"",
    b"\"2026-06-30T23:59:60Z\"",
    b"\"+262143-01-01T00:00:00Z\"",
    b"2026-02-30",
    b"00000000-0000-0000-0000-000000000001",
    b"{00000000-0000-0000-0000-000000000001}",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xae",
    b"\r\n",
    b"=",
    b":",
    b"PT1H",
    b"P99999999999D",
    b"PT1.0000000001S",
    b"dc_later_v1",
];

/// One input of the corpus with one or more changes.
pub fn one(corpus: &[Vec<u8>], chance: &mut StdRng) -> Vec<u8> {
    let mut input = corpus[chance.random_range(0..corpus.len())].clone();
    for _ in 0..=chance.random::<u8>().leading_zeros() {
        change(&mut input, corpus, chance);
        input.truncate(MOST_BYTES);
    }
    input
}

fn change(input: &mut Vec<u8>, corpus: &[Vec<u8>], chance: &mut StdRng) {
    let at = chance.random_range(0..=input.len());
    match chance.random_range(0..12) {
        0 if at < input.len() => input[at] ^= 1 << chance.random_range(0..8),
        1 if at < input.len() => input[at] = chance.random(),
        2 => {
            let bytes: Vec<u8> = (0..chance.random_range(1..8)).map(|_| chance.random()).collect();
            input.splice(at..at, bytes);
        }
        3 => drop(input.drain(part(input.len(), chance))),
        4 => {
            let copy = input[part(input.len(), chance)].to_vec();
            input.splice(at..at, copy);
        }
        5 => {
            let other = &corpus[chance.random_range(0..corpus.len())];
            input.truncate(at);
            input.extend_from_slice(&other[chance.random_range(0..=other.len())..]);
        }
        6 => input.truncate(at),
        // often many repetitions, seldom very many
        7 => {
            let copy = input[part(input.len(), chance)].to_vec();
            let times = if chance.random_ratio(1, 50) { 50_000 } else { 50 };
            let times = times.min(MOST_BYTES / copy.len().max(1));
            input.splice(at..at, copy.repeat(times));
        }
        8 => {
            let token = TOKENS[chance.random_range(0..TOKENS.len())];
            input.splice(at..at, token.iter().copied());
        }
        _ => {
            let Some(place) = token(input, chance) else { return };
            let other = &corpus[chance.random_range(0..corpus.len())];
            let new = match token(other, chance) {
                Some(range) if chance.random() => &other[range],
                _ => TOKENS[chance.random_range(0..TOKENS.len())],
            };
            input.splice(place, new.iter().copied());
        }
    }
}

/// A part of at most 40 bytes.
fn part(length: usize, chance: &mut StdRng) -> Range<usize> {
    let from = chance.random_range(0..=length);
    from..length.min(from + chance.random_range(0..40))
}

fn token(input: &[u8], chance: &mut StdRng) -> Option<Range<usize>> {
    let from = chance.random_range(0..input.len().max(1));
    let tokens = tokens(&input[from..]).map(|range| range.start + from..range.end + from);
    tokens.take(chance.random_range(1..8)).last()
}

fn tokens(input: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next + input[next..].iter().position(|byte| in_word(*byte) || *byte == b'"')?;
        let behind = &input[start + 1..];
        let length = match input[start] {
            b'"' => behind.iter().position(|byte| *byte == b'"').map_or(behind.len(), |at| at + 1),
            _ => behind.iter().position(|byte| !in_word(*byte)).unwrap_or(behind.len()),
        };
        next = start + 1 + length;
        Some(start..next)
    })
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_-.+/".contains(&byte)
}
