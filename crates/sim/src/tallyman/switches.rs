//! The misbehaviour of the simulated Tallyman, and the counters that end it.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// All kinds of misbehaviour; the default is none. Setting them restarts every count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Switches {
    /// The wait of every request before it is read, in milliseconds.
    pub latency_ms: u64,
    /// Requests with a server error as their answer.
    pub errors: ServerErrors,
    /// Connections cut without an answer.
    pub cuts: Cuts,
    /// Whole requests refused for an event in them.
    pub poison: Poison,
    /// The behaviour for single events; the first rule that matches an event applies.
    pub events: Vec<EventRule>,
}

/// Requests with a server error as their answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerErrors {
    /// The status of the answer.
    pub status: u16,
    /// The number of the next requests that fail.
    pub next: u64,
    /// The share of all other requests that fail, by the number of the request.
    pub fraction: f64,
    /// Whether the events are still accepted, as when a proxy before the server times out.
    pub after_accepting: bool,
}

impl Default for ServerErrors {
    fn default() -> Self {
        ServerErrors { status: 500, next: 0, fraction: 0.0, after_accepting: false }
    }
}

/// Connections cut without an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cuts {
    /// When the cut comes.
    pub moment: CutMoment,
    /// The number of the next requests that are cut.
    pub next: u64,
    /// The share of all other requests that are cut, by the number of the request.
    pub fraction: f64,
}

/// Whole requests refused for an event in them, which is not named.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Poison {
    /// The status of the answer.
    pub status: u16,
    /// A request with any of these ids is refused, and none of its events is accepted.
    pub ids: Vec<String>,
}

impl Default for Poison {
    fn default() -> Self {
        Poison { status: 422, ids: Vec::new() }
    }
}

/// When a connection is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CutMoment {
    /// Before the request's body is read.
    #[default]
    BeforeReading,
    /// After its events were accepted, before the answer.
    AfterAccepting,
}

/// The behaviour for some events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventRule {
    pub behaviour: Behaviour,
    /// The ids of these events.
    #[serde(default)]
    pub ids: Vec<String>,
    /// And this share of all ids, by a hash of the id.
    #[serde(default)]
    pub fraction: f64,
    /// Until this instant, not included.
    #[serde(default)]
    pub until: Option<DateTime<Utc>>,
    /// The number of times for each id.
    #[serde(default)]
    pub times: Option<u32>,
}

/// The behaviour for an event, instead of accepting it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Behaviour {
    /// Refused, `permanent` false.
    RefuseForNow,
    /// Refused, `permanent` true.
    RefuseForEver,
    /// Left out of the answer, and not accepted.
    Omit,
    /// Left out of the answer, but accepted.
    OmitThoughTaken,
}

impl Switches {
    /// The error in the switches, if there is one.
    pub(super) fn mistake(&self) -> Option<String> {
        let share = |fraction: f64| (0.0..=1.0).contains(&fraction);
        if !share(self.errors.fraction)
            || !share(self.cuts.fraction)
            || !self.events.iter().all(|rule| share(rule.fraction))
        {
            return Some("a fraction lies between 0 and 1".to_owned());
        }
        if !(400..500).contains(&self.poison.status) {
            return Some("poison.status is a status from 400 to 499".to_owned());
        }
        (!(500..600).contains(&self.errors.status))
            .then(|| "errors.status is a status from 500 to 599".to_owned())
    }
}

/// The switches with their remaining counts.
#[derive(Debug, Default)]
pub struct Running {
    switches: Switches,
    /// How often a rule, by its position, has matched an id.
    met: HashMap<(usize, String), u32>,
}

impl Running {
    pub fn new(switches: Switches) -> Self {
        Running { switches, met: HashMap::new() }
    }

    /// The current switches: `next` is the remaining count.
    pub fn switches(&self) -> &Switches {
        &self.switches
    }

    /// Whether, and when, this request's connection is cut.
    pub fn cut(&mut self, request: u64) -> Option<CutMoment> {
        let cuts = &mut self.switches.cuts;
        (counted(&mut cuts.next) || chosen(cuts.fraction, "cut", &request.to_string()))
            .then_some(cuts.moment)
    }

    /// Whether this request gets a server error: the status, and whether its events are still
    /// accepted.
    pub fn error(&mut self, request: u64) -> Option<(u16, bool)> {
        let errors = &mut self.switches.errors;
        let fails =
            counted(&mut errors.next) || chosen(errors.fraction, "error", &request.to_string());
        fails.then_some((errors.status, errors.after_accepting))
    }

    /// The status that refuses a whole request with these ids, if any does.
    pub fn poison<'a>(&self, mut ids: impl Iterator<Item = &'a str>) -> Option<u16> {
        let poison = &self.switches.poison;
        ids.any(|id| poison.ids.iter().any(|named| named == id)).then_some(poison.status)
    }

    /// The behaviour for this event, instead of accepting it.
    pub fn event(&mut self, id: &str, now: DateTime<Utc>) -> Option<Behaviour> {
        for (position, rule) in self.switches.events.iter().enumerate() {
            let named = rule.ids.iter().any(|named| named == id)
                || chosen(rule.fraction, &format!("{:?}", rule.behaviour), id);
            if !named || rule.until.is_some_and(|until| now >= until) {
                continue;
            }
            let Some(times) = rule.times else { return Some(rule.behaviour) };
            let met = self.met.entry((position, id.to_owned())).or_default();
            if *met < times {
                *met += 1;
                return Some(rule.behaviour);
            }
        }
        None
    }
}

fn counted(left: &mut u64) -> bool {
    let some = *left > 0;
    *left = left.saturating_sub(1);
    some
}

/// Whether `key` belongs to the share of all keys. The same key gives the same answer; another
/// `salt` makes another choice.
fn chosen(fraction: f64, salt: &str, key: &str) -> bool {
    if fraction <= 0.0 {
        return false;
    }
    let hash = Sha256::new().chain_update(salt).chain_update([0]).chain_update(key).finalize();
    let first = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]);
    f64::from(first) < fraction * (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(behaviour: Behaviour, ids: &[&str]) -> EventRule {
        let ids = ids.iter().map(|id| (*id).to_owned()).collect();
        EventRule { behaviour, ids, fraction: 0.0, until: None, times: None }
    }

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).expect("in range")
    }

    #[test]
    fn counts_run_out() {
        let errors = ServerErrors { next: 2, ..ServerErrors::default() };
        let cuts = Cuts { next: 1, ..Cuts::default() };
        let mut running = Running::new(Switches { errors, cuts, ..Switches::default() });
        assert_eq!(
            [1, 2, 3].map(|request| running.error(request)),
            [Some((500, false)), Some((500, false)), None]
        );
        assert_eq!(
            [1, 2].map(|request| running.cut(request)),
            [Some(CutMoment::BeforeReading), None]
        );
        assert_eq!(running.switches().errors.next, 0);
    }

    #[test]
    fn a_rule_ends_by_times_for_each_id_and_by_time() {
        let twice = EventRule { times: Some(2), ..rule(Behaviour::RefuseForNow, &["a", "b"]) };
        let until = EventRule { until: Some(at(10)), ..rule(Behaviour::Omit, &["a"]) };
        let mut running =
            Running::new(Switches { events: vec![twice, until], ..Switches::default() });
        let now_and_later = [at(9); 3].map(|now| running.event("a", now));
        assert_eq!(
            now_and_later,
            [Some(Behaviour::RefuseForNow), Some(Behaviour::RefuseForNow), Some(Behaviour::Omit)]
        );
        assert_eq!(running.event("a", at(10)), None);
        assert_eq!(running.event("b", at(10)), Some(Behaviour::RefuseForNow));
        assert_eq!(running.event("c", at(9)), None);
    }

    #[test]
    fn a_share_is_about_that_share_and_always_the_same() {
        let share: Vec<bool> = (0..2000).map(|n| chosen(0.25, "Omit", &n.to_string())).collect();
        let count = share.iter().filter(|chosen| **chosen).count();
        assert!((400..600).contains(&count), "{count} of 2000");
        assert!((0..2000).all(|n| chosen(0.25, "Omit", &n.to_string()) == share[n]));
        assert!((0..200).all(|n| chosen(1.0, "Omit", &n.to_string())));
    }

    #[test]
    fn unknown_switches_and_impossible_shares_are_refused() {
        assert!(serde_json::from_str::<Switches>(r#"{"latency":5}"#).is_err());
        let half: Switches =
            serde_json::from_str(r#"{"errors":{"fraction":0.5}}"#).expect("partial switches");
        assert_eq!(half.mistake(), None);
        assert!(
            serde_json::from_str::<Switches>(r#"{"cuts":{"fraction":2}}"#)
                .expect("readable")
                .mistake()
                .is_some()
        );
        assert!(
            serde_json::from_str::<Switches>(r#"{"poison":{"status":500}}"#)
                .expect("readable")
                .mistake()
                .is_some()
        );
        assert!(
            serde_json::from_str::<Switches>(r#"{"errors":{"status":200}}"#)
                .expect("readable")
                .mistake()
                .is_some()
        );
    }
}
