//! Reads and writes events as typed rows.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::encode::Encode;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::{Arguments as _, AssertSqlSafe, FromRow as _, PgConnection, Row, Type};
use uuid::Uuid;

use super::PartRow;
use super::parts::{event_digest, place_of};
use crate::event::{
    Digest, Event, InputStage, Payload, PrebuildClaimed, PublishMarks, Usage, UsageQuantity,
    WorkspaceBuildCompleted,
};

/// An event to insert.
#[derive(Clone)]
pub(super) struct NewRow<'a> {
    /// The index of its record in the batch.
    pub index: usize,
    pub source_id: i16,
    pub offset: i64,
    pub digest: Digest,
    pub event: &'a Event,
    /// Now, if a collector's valid signature came with the event.
    pub confirmed_at: Option<DateTime<Utc>>,
}

impl NewRow<'_> {
    /// The row as its batch's content contains it.
    pub fn part_row(&self) -> PartRow {
        PartRow {
            place: place_of(self.offset),
            digest: event_digest(self.source_id, self.offset, &self.digest, self.event),
        }
    }
}

/// The values of one column.
fn values<'n, T>(news: &'n [&NewRow<'_>], value: impl Fn(&'n NewRow<'n>) -> T) -> Vec<T> {
    news.iter().map(|new| value(new)).collect()
}

fn build<'a>(new: &'a NewRow<'a>) -> &'a WorkspaceBuildCompleted {
    match &new.event.payload {
        Payload::Build(build) => build,
        _ => unreachable!("events are sorted by type"),
    }
}

fn claim<'a>(new: &'a NewRow<'a>) -> &'a PrebuildClaimed {
    match &new.event.payload {
        Payload::Claim(claim) => claim,
        _ => unreachable!("events are sorted by type"),
    }
}

fn usage<'a>(new: &'a NewRow<'a>) -> &'a Usage {
    match &new.event.payload {
        Payload::Usage(usage) => usage,
        _ => unreachable!("events are sorted by type"),
    }
}

fn marks<'a>(new: &'a NewRow<'a>) -> &'a PublishMarks {
    &usage(new).marks
}

/// The new rows of one table, by column.
struct Rows<'n> {
    news: &'n [&'n NewRow<'n>],
    columns: Vec<&'static str>,
    arguments: PgArguments,
}

impl<'n> Rows<'n> {
    /// Rows with the columns that all tables of events have.
    fn new(batch_id: i64, news: &'n [&'n NewRow<'n>]) -> Result<Self, sqlx::Error> {
        let mut arguments = PgArguments::default();
        arguments.add(batch_id).map_err(sqlx::Error::Encode)?;
        let mut rows = Rows { news, columns: Vec::new(), arguments };
        rows.column("source_id", |new| new.source_id)?;
        rows.column("log_offset", |new| new.offset)?;
        rows.column("digest", |new| new.digest.to_vec())?;
        rows.column("confirmed_at", |new| new.confirmed_at)?;
        Ok(rows)
    }

    fn column<T>(
        &mut self,
        name: &'static str,
        value: impl Fn(&'n NewRow<'n>) -> T,
    ) -> Result<(), sqlx::Error>
    where
        Vec<T>: Encode<'n, Postgres> + Type<Postgres>,
    {
        self.columns.push(name);
        self.arguments.add(values(self.news, value)).map_err(sqlx::Error::Encode)
    }

    /// The statement that inserts the rows and returns `returned` of those that are new. Parameter
    /// 1 is the batch, and each column follows as an array.
    fn insert(&self, table: &str, returned: &str) -> String {
        let columns = self.columns.join(", ");
        let arrays: Vec<String> =
            (2..).take(self.columns.len()).map(|number| format!("${number}")).collect();
        // PostgreSQL casts text to a number only when it is asked to.
        let selected: Vec<&str> = self
            .columns
            .iter()
            .map(|column| match *column {
                "quantity" => "quantity::numeric",
                column => column,
            })
            .collect();
        format!(
            "insert into {table} (batch_id, {columns})
             select $1, {} from unnest({}) as new ({columns})
             on conflict on constraint {table}_is_unique do nothing returning {returned}",
            selected.join(", "),
            arrays.join(", ")
        )
    }
}

/// Adds columns that have the names of the event's fields.
macro_rules! add_columns {
    ($rows:ident, $event:ident: $($field:ident)+) => {
        $($rows.column(stringify!($field), |new| &$event(new).$field)?;)+
    };
}

/// Adds the columns that builds and prebuild claims share.
macro_rules! add_shared_columns {
    ($rows:ident, $event:ident) => {
        add_columns!($rows, $event: build_id workspace_id organization_id template_id template_version_id preset_id
            initiator_id build_number created_at started_at completed_at
            organization_name template_name preset_name);
        $rows.column("status", |new| $event(new).status.as_str())?;
        $rows.column("stage", |new| $event(new).stage.map(InputStage::as_str))?;
    };
}

/// Inserts builds and returns, by index, the digests of ids that already exist.
pub(super) async fn insert_builds(
    tx: &mut PgConnection,
    batch_id: i64,
    news: &[&NewRow<'_>],
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if news.is_empty() {
        return Ok(HashMap::new());
    }
    let mut rows = Rows::new(batch_id, news)?;
    add_shared_columns!(rows, build);
    add_columns!(rows, build: owner_id reason first_build_by_prebuilds_user first_successful_start
        has_ai_task has_external_agent daily_cost template_version_name workspace_name owner_name);
    rows.column("transition", |new| build(new).transition.as_str())?;
    let first_build_stage = |new| build(new).first_build_stage.map(InputStage::as_str);
    rows.column("first_build_stage", first_build_stage)?;
    let statement = rows.insert("workspace_build", "source_id, build_id");
    let inserted = insert_and_return_keys::<Uuid>(tx, statement, rows.arguments).await?;
    record_first_starts(tx, news, &inserted).await?;
    all_known(known_builds(tx, news, &inserted).await?, news.len() - inserted.len())
}

/// The ledger's digests of builds other than `inserted`, by index.
pub(super) async fn known_builds(
    tx: &mut PgConnection,
    news: &[&NewRow<'_>],
    inserted: &HashSet<(i16, Uuid)>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    let known = sqlx::query(
        "select source_id, build_id, digest from workspace_build
         where (source_id, build_id) in (select * from unnest($1::smallint[], $2::uuid[]))",
    );
    known_digests(tx, known, news, inserted, |new| build(new).build_id).await
}

/// Records the first build that a workspace names as its first successful start. Folds count only
/// this build as a creation.
async fn record_first_starts(
    tx: &mut PgConnection,
    news: &[&NewRow<'_>],
    inserted: &HashSet<(i16, Uuid)>,
) -> Result<(), sqlx::Error> {
    let mut first: Vec<&NewRow> = news
        .iter()
        .copied()
        .filter(|new| {
            build(new).first_successful_start
                && inserted.contains(&(new.source_id, build(new).build_id))
        })
        .collect();
    if first.is_empty() {
        return Ok(());
    }
    first.sort_by_key(|new| (new.source_id, build(new).workspace_id, build(new).build_number));
    first.dedup_by_key(|new| (new.source_id, build(new).workspace_id));
    // the conflict locks the existing row: a correction that removes it waits for this batch
    sqlx::query(
        "insert into workspace_first_start as kept (source_id, workspace_id, build_id)
         select * from unnest($1::smallint[], $2::uuid[], $3::uuid[])
         on conflict on constraint workspace_first_start_is_unique do update set build_id = kept.build_id where false",
    )
    .bind(values(&first, |new| new.source_id))
    .bind(values(&first, |new| build(new).workspace_id))
    .bind(values(&first, |new| build(new).build_id))
    .execute(tx)
    .await?;
    Ok(())
}

/// Does the same as [`insert_builds`] for prebuild claims.
pub(super) async fn insert_claims(
    tx: &mut PgConnection,
    batch_id: i64,
    news: &[&NewRow<'_>],
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if news.is_empty() {
        return Ok(HashMap::new());
    }
    let mut rows = Rows::new(batch_id, news)?;
    add_shared_columns!(rows, claim);
    add_columns!(rows, claim: claimed_by);
    let statement = rows.insert("prebuild_claim", "source_id, build_id");
    let inserted = insert_and_return_keys::<Uuid>(tx, statement, rows.arguments).await?;
    all_known(known_claims(tx, news, &inserted).await?, news.len() - inserted.len())
}

/// Does the same as [`known_builds`] for prebuild claims.
pub(super) async fn known_claims(
    tx: &mut PgConnection,
    news: &[&NewRow<'_>],
    inserted: &HashSet<(i16, Uuid)>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    let known = sqlx::query(
        "select source_id, build_id, digest from prebuild_claim
         where (source_id, build_id) in (select * from unnest($1::smallint[], $2::uuid[]))",
    );
    known_digests(tx, known, news, inserted, |new| claim(new).build_id).await
}

/// Does the same as [`insert_builds`] for usage, and queues publications. They are due at once,
/// even if this process's clock is ahead.
pub(super) async fn insert_usage(
    tx: &mut PgConnection,
    batch_id: i64,
    news: &[&NewRow<'_>],
    now: DateTime<Utc>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if news.is_empty() {
        return Ok(HashMap::new());
    }
    let mut rows = Rows::new(batch_id, news)?;
    rows.column("event_type", |new| usage(new).quantity.usage_type().as_str())?;
    rows.column("quantity", |new| usage(new).quantity.number().to_string())?;
    add_columns!(rows, usage: id created_at);
    add_columns!(rows, marks: publish_started_at published_at failure_message);
    let accepted = rows.insert("usage_event", "source_id, id, created_at");
    rows.arguments.add(now).map_err(sqlx::Error::Encode)?;
    let statement = format!(
        "with accepted as ({accepted}), queued as (
             insert into publication (source_id, event_id, event_created_at, queued_batch_id, next_attempt_at)
             select source_id, id, created_at, $1, least(created_at, ${}) from accepted
         )
         select source_id, id from accepted",
        rows.arguments.len()
    );
    let inserted = insert_and_return_keys::<String>(tx, statement, rows.arguments).await?;
    all_known(known_usage(tx, news, &inserted).await?, news.len() - inserted.len())
}

/// Does the same as [`known_builds`] for usage.
pub(super) async fn known_usage(
    tx: &mut PgConnection,
    news: &[&NewRow<'_>],
    inserted: &HashSet<(i16, String)>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    let known = sqlx::query(
        "select source_id, id, digest from usage_event where (source_id, id) in (select * from unnest($1::smallint[], $2::text[]))",
    );
    known_digests(tx, known, news, inserted, |new| usage(new).id.clone()).await
}

/// Checks that each id that was not inserted exists and is committed: an insert waits for a
/// concurrent insert's commit.
fn all_known(
    known: HashMap<usize, Digest>,
    expected: usize,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if known.len() == expected {
        Ok(known)
    } else {
        Err(sqlx::Error::Protocol("an id was neither inserted nor found".into()))
    }
}

/// Runs an insert. Returns the keys of the new rows.
async fn insert_and_return_keys<K>(
    tx: &mut PgConnection,
    statement: String,
    arguments: PgArguments,
) -> Result<HashSet<(i16, K)>, sqlx::Error>
where
    K: std::hash::Hash + Eq + for<'r> sqlx::Decode<'r, Postgres> + Type<Postgres>,
{
    // The statement has names of columns and no values.
    let rows = sqlx::query_with(AssertSqlSafe(statement), arguments).fetch_all(tx).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// The digests of the existing ids that were not inserted, by index.
async fn known_digests<'q, K>(
    tx: &mut PgConnection,
    query: sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>,
    news: &[&NewRow<'_>],
    inserted: &HashSet<(i16, K)>,
    key: impl Fn(&NewRow<'_>) -> K,
) -> Result<HashMap<usize, Digest>, sqlx::Error>
where
    K: std::hash::Hash + Eq + Clone + Send + sqlx::postgres::PgHasArrayType,
    K: for<'r> sqlx::Decode<'r, sqlx::Postgres>
        + for<'e> sqlx::Encode<'e, sqlx::Postgres>
        + sqlx::Type<sqlx::Postgres>
        + 'q,
{
    let existing: HashMap<(i16, K), usize> = news
        .iter()
        .map(|new| ((new.source_id, key(new)), new.index))
        .filter(|(key, _)| !inserted.contains(key))
        .collect();
    if existing.is_empty() {
        return Ok(HashMap::new());
    }
    let (sources, ids): (Vec<i16>, Vec<K>) = existing.keys().cloned().unzip();
    let rows = query.bind(sources).bind(ids).fetch_all(tx).await?;
    let mut digests = HashMap::with_capacity(rows.len());
    for row in &rows {
        let digest: Vec<u8> = row.try_get(2)?;
        let digest = Digest::try_from(digest)
            .map_err(|_| sqlx::Error::Protocol("a digest is not 32 bytes".into()))?;
        if let Some(index) = existing.get(&(row.try_get(0)?, row.try_get(1)?)) {
            digests.insert(*index, digest);
        }
    }
    Ok(digests)
}

/// Reads a row of `usage_event`. The query must select the quantity as `quantity::text`.
pub(super) fn usage_of(row: &PgRow) -> Result<Usage, sqlx::Error> {
    let usage_type = row.try_get("event_type")?;
    let number: u64 = row
        .try_get::<&str, _>("quantity")?
        .parse()
        .map_err(|_| sqlx::Error::Protocol("quantity out of range".into()))?;
    Ok(Usage {
        id: row.try_get("id")?,
        quantity: UsageQuantity::new(usage_type, number)
            .map_err(|error| sqlx::Error::Protocol(error.to_string()))?,
        created_at: row.try_get("created_at")?,
        marks: PublishMarks::from_row(row)?,
    })
}
