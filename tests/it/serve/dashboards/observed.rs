//! Creations and claims of known durations, before and after a moment, and their true numbers.

use std::collections::BTreeMap;

use chrono::TimeDelta;
use tallyline::event::{BuildStatus, Event, InputStage, PREBUILDS_USER, Payload};
use uuid::Uuid;

use crate::support::ledger::{DEPLOYMENT, build, claim, noon};

/// The kind of observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Regular,
    Prebuild,
    Claim,
}

/// Organization, template, preset.
pub type Names = [&'static str; 3];

/// Durations in microseconds by series.
#[derive(Clone, Debug, Default)]
pub struct Observed(BTreeMap<(Kind, Names), Vec<i64>>);

pub const KINDS: [Kind; 3] = [Kind::Regular, Kind::Prebuild, Kind::Claim];

/// Names with characters that are special in a regular expression.
const SERIES: [(Names, i64); 4] = [
    (["engineering", "docker", "small"], 40),
    (["engineering", "docker", ""], 33),
    (["engineering", "c++ (gcc)", "small"], 58),
    (["r&d.core", "docker", "large|gpu"], 107),
];
/// A series that first appears after the moment.
const LATE: (Names, i64) = (["design", "docker", "large|gpu"], 5);

impl Observed {
    /// Few, and all longer than any later one: a query that includes them is far off.
    pub fn before() -> Observed {
        let longest =
            |n: i64| (0..3).map(|i| 7_000_000_000 + n * 1_000_000 + i).collect::<Vec<_>>();
        let all = (0..).zip(KINDS).flat_map(|(k, kind)| {
            (0..).zip(SERIES).map(move |(n, (names, _))| ((kind, names), longest(k * 10 + n)))
        });
        Observed(all.collect())
    }

    /// From half a second to a quarter of an hour on a logarithmic scale, all different.
    pub fn after() -> Observed {
        let mut observed = Observed::default();
        for (k, kind) in (0..).zip(KINDS) {
            for (n, (names, count)) in (0..).zip(SERIES) {
                observed.0.insert(
                    (kind, names),
                    durations(k * 10 + n, count + k * 2 * i64::from(names[2] != "small")),
                );
            }
        }
        observed.0.insert((Kind::Regular, LATE.0), durations(99, LATE.1));
        observed
    }

    /// Without the series that first appears after the moment: a rate needs a series' second
    /// sample.
    pub fn known_before(&self) -> Observed {
        Observed(
            self.0
                .iter()
                .filter(|((_, names), _)| *names != LATE.0)
                .map(|(series, micros)| (*series, micros.clone()))
                .collect(),
        )
    }

    /// The number of observations of this kind with matching names.
    pub fn count(&self, kind: Kind, wanted: impl Fn(&Names) -> bool) -> f64 {
        self.0
            .iter()
            .filter(|((of, names), _)| *of == kind && wanted(names))
            .map(|(_, micros)| micros.len() as f64)
            .sum()
    }

    /// The true quantile of this kind in seconds, by the first `labels` names. If it is between two
    /// observations, both: their mean is as true as either.
    pub fn quantiles(
        &self,
        kind: Kind,
        quantile: f64,
        labels: usize,
    ) -> BTreeMap<Vec<&'static str>, [f64; 2]> {
        let mut groups: BTreeMap<Vec<&'static str>, Vec<i64>> = BTreeMap::new();
        for ((_, names), micros) in self.0.iter().filter(|((of, _), _)| *of == kind) {
            groups.entry(names[..labels].to_vec()).or_default().extend(micros);
        }
        let truth = |micros: &mut Vec<i64>| {
            micros.sort_unstable();
            let rank = quantile * micros.len() as f64;
            [rank - 1e-6, rank + 1e-6].map(|rank| micros[rank.ceil() as usize - 1] as f64 / 1e6)
        };
        groups.into_iter().map(|(names, mut micros)| (names, truth(&mut micros))).collect()
    }

    /// One successful build of each duration, numbered from `first`.
    pub fn builds(&self, first: u32) -> Vec<Event> {
        let all = self.each().filter(|(kind, ..)| *kind != Kind::Claim);
        (first..)
            .zip(all)
            .map(|(n, (kind, names, micros))| creation(n, kind, names, micros))
            .collect()
    }

    /// One successful claim of each duration, numbered from `first`.
    pub fn claims(&self, first: u32) -> Vec<Event> {
        let all = self.each().filter(|(kind, ..)| *kind == Kind::Claim);
        (first..).zip(all).map(|(n, (_, names, micros))| claimed(n, names, micros)).collect()
    }

    fn each(&self) -> impl Iterator<Item = (Kind, Names, i64)> {
        self.0.iter().flat_map(|((kind, names), micros)| {
            micros.iter().map(move |micros| (*kind, *names, *micros))
        })
    }
}

fn durations(seed: i64, count: i64) -> Vec<i64> {
    let part = |i: i64| ((i * 7919 + seed * 104_729) % 10_007) as f64 / 10_007.0;
    (0..count).map(|i| (500_000.0 * 1800_f64.powf(part(i))) as i64 + i).collect()
}

fn creation(n: u32, kind: Kind, [organization, template, preset]: Names, micros: i64) -> Event {
    let mut event = build(DEPLOYMENT, n);
    let Payload::Build(build) = &mut event.payload else { unreachable!("it is a build") };
    let prebuilt = kind == Kind::Prebuild;
    build.initiator_id = if prebuilt { PREBUILDS_USER } else { Uuid::from_u128(100) };
    build.owner_id = build.initiator_id;
    (build.stage, build.first_build_by_prebuilds_user) =
        (prebuilt.then_some(InputStage::Create), prebuilt);
    (build.status, build.first_successful_start) = (BuildStatus::Succeeded, true);
    build.completed_at = noon() + TimeDelta::seconds(i64::from(n));
    build.started_at = Some(build.completed_at - TimeDelta::microseconds(micros));
    build.created_at = build.completed_at - TimeDelta::hours(3);
    (build.organization_name, build.template_name, build.preset_name) =
        (organization.into(), template.into(), preset.into());
    event
}

fn claimed(n: u32, [organization, template, preset]: Names, micros: i64) -> Event {
    let mut event = claim(DEPLOYMENT, n);
    let Payload::Claim(claim) = &mut event.payload else { unreachable!("it is a claim") };
    claim.status = BuildStatus::Succeeded;
    claim.completed_at = noon() + TimeDelta::seconds(i64::from(n));
    claim.started_at = Some(claim.completed_at - TimeDelta::microseconds(micros));
    claim.created_at = claim.completed_at - TimeDelta::hours(3);
    (claim.organization_name, claim.template_name, claim.preset_name) =
        (organization.into(), template.into(), preset.into());
    event
}
