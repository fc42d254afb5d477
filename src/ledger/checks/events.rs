//! Each batch with its events and rejects, and each passed reject with its record.

use sqlx::PgConnection;

use super::page::BatchPage;
use super::query::{LISTED, check, differences, known_of};
use crate::ledger::{AuditItem, Difference};

const EVENTS: &str = "select 'batch ' || b.id, 'accepted ' || b.accepted || ', rows ' || coalesce(rows.n, 0)
     from batch b left join (
         select batch_id, count(*) as n from (
             select batch_id from workspace_build where batch_id = any($1) union all select batch_id from prebuild_claim where batch_id = any($1)
             union all select batch_id from usage_event where batch_id = any($1)
         ) as events group by batch_id) as rows on rows.batch_id = b.id
     where b.id = any($1) and b.accepted <> coalesce(rows.n, 0) limit $2";

const REJECTS: &str = "select 'batch ' || b.id, 'refused ' || (b.rejects + b.conflicts + b.held) || ', rows ' || coalesce(rows.n, 0)
     from batch b left join (select batch_id, count(*) as n from reject where batch_id = any($1) group by batch_id) as rows on rows.batch_id = b.id
     where b.id = any($1) and b.kind = 'log' and b.rejects + b.conflicts + b.held <> coalesce(rows.n, 0) limit $2";

/// The batches of the join are limited to the same ids, so that no plan reads all of them.
const ORPHANS: &str = "select id, 'names batch ' || batch_id || ', which does not exist' from (
         select batch_id, build_id::text as id from workspace_build where batch_id > $1 and batch_id <= $2
         union all select batch_id, build_id::text from prebuild_claim where batch_id > $1 and batch_id <= $2
         union all select batch_id, id from usage_event where batch_id > $1 and batch_id <= $2) as events
     where not exists (select from batch where batch.id = events.batch_id and batch.id > $1 and batch.id <= $2) limit $3";

/// Rejects with a place in the ranges of these batches.
const PASSED_TO: &str = "select r.id from batch b join reject r on r.passed_topic = b.topic and r.passed_partition = b.partition
         and r.passed_generation = b.generation and r.passed_offset >= b.first_offset and r.passed_offset < b.next_offset
     where b.id = any($1) and b.kind = 'log'";

/// Rejects with a place that no batch of its generation covers, although it is read or has ended.
const PASSED_BEYOND: &str = "with life as (
         select topic, partition, generation, start_offset, null::bigint as end_offset from position
         union all select topic, partition, generation, start_offset, next_offset from past_position)
     select r.id from life join reject r on r.passed_topic = life.topic and r.passed_partition = life.partition and r.passed_generation = life.generation
         and r.passed_offset < life.start_offset
     union all
     select r.id from life join reject r on r.passed_topic = life.topic and r.passed_partition = life.partition and r.passed_generation = life.generation
         and r.passed_offset >= life.end_offset";

/// The partition is read beyond the place, or its generation has ended. The record must be an
/// accepted event or a reject.
const PASSED_AND_GONE: &str = "select coalesce(event_id, 'reject ' || id), 'reject ' || id || ' is ' || state || ' and was appended again at ' || topic || '/'
         || partition || '@' || log_offset || ', but the ledger has no event or reject from there; run `tallyline rejects resubmit --force`'
     from (select r.id, r.state, r.passed_topic as topic, r.passed_partition as partition, r.passed_generation as generation,
               r.passed_offset as log_offset, coalesce(a.detail->>'event_id', r.event_id) as event_id,
               coalesce((a.detail->>'deployment_id')::uuid, r.deployment_id) as deployment_id
           from reject r join operator_act a on a.id = r.act_id where r.id = any($1) and r.passed_offset is not null) as passed
     join (select topic, partition, generation, next_offset, false as is_over from position
           union all select topic, partition, generation, next_offset, true from past_position) as life using (topic, partition, generation)
     cross join lateral (select substring(event_id from ':([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$')::uuid) as build (key)
     where (is_over or next_offset > log_offset)
         and not exists (select from reject r where r.topic = passed.topic and r.partition = passed.partition
             and r.generation = passed.generation and r.log_offset = passed.log_offset)
         and not exists (select from source s where s.deployment_id = passed.deployment_id and (
             exists (select from usage_event e where e.source_id = s.id and e.id = passed.event_id)
             or event_id like 'workspace_build_completed:%'
                 and exists (select from workspace_build b where b.source_id = s.id and b.build_id = build.key)
             or event_id like 'prebuild_claimed:%'
                 and exists (select from prebuild_claim c where c.source_id = s.id and c.build_id = build.key))) limit $2";

/// The page's batches, and the events whose batch id lies between those of the page.
pub(super) async fn of_batches(
    tx: &mut PgConnection,
    page: &BatchPage,
) -> Result<Vec<Difference>, sqlx::Error> {
    let mut found = check(tx, "batch_without_its_events", EVENTS, &page.ids).await?;
    found.extend(check(tx, "batch_without_its_rejects", REJECTS, &page.ids).await?);
    // before the first batch, no event can name one
    let first_id = if page.from.sequence == 0 { i64::MIN } else { page.from.batch_id };
    found.extend(orphans(tx, first_id, page.last_id).await?);
    let passed: Vec<i64> =
        sqlx::query_scalar(PASSED_TO).bind(&page.ids).fetch_all(&mut *tx).await?;
    found.extend(passed_and_gone(tx, &passed).await?);
    Ok(found)
}

/// Events with a batch id in this range whose batch does not exist.
async fn orphans(
    tx: &mut PgConnection,
    after: i64,
    until: i64,
) -> Result<Vec<Difference>, sqlx::Error> {
    let rows = sqlx::query_as(ORPHANS).bind(after).bind(until).bind(LISTED).fetch_all(tx).await?;
    Ok(differences("event_without_its_batch", rows))
}

async fn passed_and_gone(
    tx: &mut PgConnection,
    rejects: &[i64],
) -> Result<Vec<Difference>, sqlx::Error> {
    if rejects.is_empty() {
        return Ok(Vec::new());
    }
    check(tx, "passed_and_gone", PASSED_AND_GONE, rejects).await
}

/// Rejects whose place no batch covers. It reads only such rejects.
pub(super) async fn passed_beyond_an_end(
    tx: &mut PgConnection,
) -> Result<Vec<Difference>, sqlx::Error> {
    let beyond: Vec<i64> = sqlx::query_scalar(PASSED_BEYOND).fetch_all(&mut *tx).await?;
    passed_and_gone(tx, &beyond).await
}

/// What still differs of the known items.
pub(super) async fn known(
    tx: &mut PgConnection,
    known: &[AuditItem],
) -> Result<Vec<Difference>, sqlx::Error> {
    let number = |text: &str, before: &str| {
        let digits = text.strip_prefix(before)?;
        digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len())].parse().ok()
    };
    let batches = |kind| known_of(known, kind, |item| number(&item.id, "batch "));
    let mut found =
        check(tx, "batch_without_its_events", EVENTS, &batches("batch_without_its_events")).await?;
    let refused = batches("batch_without_its_rejects");
    found.extend(check(tx, "batch_without_its_rejects", REJECTS, &refused).await?);
    let orphaned =
        known_of(known, "event_without_its_batch", |item| number(&item.detail, "names batch "));
    for batch_id in std::collections::BTreeSet::<i64>::from_iter(orphaned) {
        found.extend(orphans(tx, batch_id - 1, batch_id).await?);
    }
    let passed = known_of(known, "passed_and_gone", |item| number(&item.detail, "reject "));
    found.extend(passed_and_gone(tx, &passed).await?);
    Ok(found)
}
