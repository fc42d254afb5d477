//! Finds rows that pages by time miss, because they came later than their date: by counts of days,
//! and by request.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::bounds::{Bounds, is_due};
use super::open::{Collector, ReadDays};
use super::report::PassTotals;
use super::settings::CollectError;
use crate::coderd::{Catalog, Reader, UsageKey};
use crate::event::build_of;
use crate::ledger::{collector_requests, known};

/// Compared days before today: older usage cannot be published.
const COMPARED_DAYS: i64 = 31;

const DAY_SECONDS: i64 = 86_400;

impl Collector {
    /// Compares the usage rows of each of the last days and types with the ledger's, and reads the
    /// days that differ. It reads a day again only if its counts change. It waits until the ledger
    /// has the passes before the one in which it becomes due: rows in flight look missing. It does
    /// not wait for later passes, or a slow consumer would postpone it for ever.
    pub(super) async fn compare_days(
        &mut self,
        reader: &mut Reader,
        bounds: &Bounds,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        if bounds.from.is_none()
            || !is_due(self.compared_at, bounds.started_at, self.settings.compare_interval)
        {
            return Ok(());
        }
        let due_in = *self.compare_due_in.get_or_insert(self.pass_number);
        if self.passes_ahead.front().is_some_and(|(number, _)| *number < due_in) {
            return Ok(());
        }
        // set first: a comparison that fails postpones itself, not the passes
        (self.compared_at, self.compare_due_in) = (Some(bounds.started_at), None);
        let today = bounds.now.timestamp().div_euclid(DAY_SECONDS);
        let (from, until) =
            (start_of(today.saturating_sub(COMPARED_DAYS)), start_of(today.saturating_add(2)));
        let in_coderd = reader.usage_days(from, until).await?;
        let in_ledger = self
            .ledger
            .run(async |conn| known::usage_days(conn, self.source.id, from, until).await)
            .await?;
        let differences = differences(&in_coderd, &in_ledger);
        let days: BTreeSet<i64> = differences
            .iter()
            .filter(|(key, counts)| self.read_days.get(key) != Some(counts))
            .map(|((day, _), _)| *day)
            .collect();
        for day in days {
            self.usage_of_day(reader, day, totals).await?;
        }
        self.read_days = differences;
        Ok(())
    }

    async fn usage_of_day(
        &mut self,
        reader: &mut Reader,
        day: i64,
        totals: &mut PassTotals,
    ) -> Result<(), CollectError> {
        let mut last: Option<UsageKey> = None;
        loop {
            self.lease.check()?;
            let (from, until) = (start_of(day), start_of(day.saturating_add(1)));
            let keys =
                reader.usage_keys_dated(from, until, last.as_ref(), self.settings.page).await?;
            self.take_usage(reader, &keys, totals).await?;
            match keys.into_iter().next_back() {
                Some(key) => last = Some(key),
                None => return Ok(()),
            }
        }
    }

    /// Reads the rows that the audit misses and returns their event ids. Appends a row again if its
    /// pass is in the ledger and the row is not.
    pub(super) async fn fetch(
        &mut self,
        reader: &mut Reader,
        catalog: &Catalog,
        totals: &mut PassTotals,
    ) -> Result<Vec<String>, CollectError> {
        let requested = self
            .ledger
            .run(async |conn| {
                collector_requests::fetches(conn, self.source.id, self.settings.page).await
            })
            .await?;
        let builds: Vec<Uuid> = requested.iter().filter_map(|id| build_of(id)).collect();
        let usage: Vec<String> =
            requested.iter().filter(|id| build_of(id).is_none()).cloned().collect();
        for id in &builds {
            self.builds.forget_if_recorded(id, self.pass_in_ledger);
            self.claims.forget_if_recorded(id, self.pass_in_ledger);
        }
        for id in &usage {
            self.usage.forget_if_recorded(id, self.pass_in_ledger);
        }
        if !builds.is_empty() {
            let keys = reader.build_keys_of(&builds).await?;
            self.take_builds(reader, catalog, &keys, totals).await?;
        }
        if !usage.is_empty() && catalog.usage_events {
            let keys = reader.usage_keys_of(&usage).await?;
            self.take_usage(reader, &keys, totals).await?;
        }
        Ok(requested)
    }
}

fn differences(
    in_coderd: &BTreeMap<(i64, String), i64>,
    in_ledger: &BTreeMap<(i64, String), i64>,
) -> ReadDays {
    let of = |side: &BTreeMap<(i64, String), i64>, key| side.get(key).copied().unwrap_or(0);
    let both = in_coderd
        .keys()
        .chain(in_ledger.keys())
        .map(|key| (key.clone(), (of(in_coderd, key), of(in_ledger, key))));
    both.filter(|(_, (in_coderd, in_ledger))| in_coderd != in_ledger).collect()
}

fn start_of(day: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(day.saturating_mul(DAY_SECONDS), 0).unwrap_or(DateTime::<Utc>::MAX_UTC)
}
