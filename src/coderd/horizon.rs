//! Which commits a later read may still miss.

use chrono::{DateTime, Utc};
use sqlx::FromRow;

use super::connect::within;
use super::functions::Access;
use super::{Catalog, CoderdError, Reader};

/// It is read before the data. A transaction that a later statement does not see wrote its rows at
/// or after `oldest`, or after `now`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct Horizon {
    /// The database's clock at the query.
    pub now: DateTime<Utc>,
    /// When the oldest open transaction of this database began, including prepared ones. None: none
    /// is open, or none can be seen.
    pub oldest: Option<DateTime<Utc>>,
    /// Whether all sessions can be seen. They cannot on a standby (the writers are elsewhere), with
    /// `track_activities` off, or without the function of `grants.sql` or `pg_read_all_stats`. Then
    /// `oldest` means nothing.
    pub sees_all: bool,
}

impl Horizon {
    /// A statement that begins later sees every write dated before this instant. None: unknown.
    #[must_use]
    pub fn complete_before(&self) -> Option<DateTime<Utc>> {
        self.sees_all.then(|| self.oldest.map_or(self.now, |oldest| oldest.min(self.now)))
    }
}

impl Reader {
    pub async fn now(&mut self) -> Result<DateTime<Utc>, CoderdError> {
        within(self.deadline, sqlx::query_scalar("select now()").fetch_one(&mut self.connection))
            .await
    }

    /// The database's time and its oldest open transaction.
    pub async fn horizon(&mut self, catalog: &Catalog) -> Result<Horizon, CoderdError> {
        // now() is the start of this statement, so it is before the query of the sessions.
        let query = match catalog.open_transactions {
            Some(Access::Function) => {
                "select now() as now, seen.sees_all, seen.started_at as oldest from tallyline.oldest_transaction() seen"
            }
            Some(Access::Tables) => {
                "select now() as now, not pg_is_in_recovery() and current_setting('track_activities')::boolean as sees_all,
                     min(open.started_at) as oldest
                 from (
                     select xact_start as started_at from pg_stat_activity
                     where datname = current_database() and pid <> pg_backend_pid() and backend_type not in ('autovacuum worker', 'walsender')
                     union all
                     select prepared from pg_prepared_xacts where database = current_database()
                 ) open"
            }
            None => "select now() as now, false as sees_all, null::timestamptz as oldest",
        };
        within(self.deadline, sqlx::query_as(query).fetch_one(&mut self.connection)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    #[test]
    fn the_horizon_is_the_earlier_of_now_and_the_oldest_transaction() {
        assert_eq!(
            Horizon { now: at(10), oldest: Some(at(4)), sees_all: true }.complete_before(),
            Some(at(4))
        );
        assert_eq!(
            Horizon { now: at(10), oldest: Some(at(11)), sees_all: true }.complete_before(),
            Some(at(10))
        );
        assert_eq!(
            Horizon { now: at(10), oldest: None, sees_all: true }.complete_before(),
            Some(at(10))
        );
    }

    #[test]
    fn completeness_needs_the_right_to_see_other_transactions() {
        assert_eq!(Horizon { now: at(10), oldest: None, sees_all: false }.complete_before(), None);
        assert_eq!(
            Horizon { now: at(10), oldest: Some(at(4)), sees_all: false }.complete_before(),
            None
        );
    }
}
