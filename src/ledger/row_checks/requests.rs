//! Batches with their settlements, and requests to the vendor with their attempts.

use super::page::{Table, end, page};

pub(super) const BATCHES: Table = Table {
    first: &["-9223372036854775808"],
    end: end!("batch", "id", "id::text", "($1::text[])[1]::bigint"),
    removed: None,
    checks: &[(
        "batch_off_its_settlements",
        concat!(
            page!("*", "batch", "id", "($1::text[])[1]::bigint", "($3::text[])[1]::bigint"),
            "select 'batch ' || b.id, 'the batch counts ' || b.settled || ' settled without the vendor, rows ' || s.n
             from page b cross join lateral (select count(*) as rows, count(*) filter (where state not in ('published', 'refused')) as n
                 from settlement where batch_id = b.id) s
             where b.settled <> s.n or b.kind not in ('verdicts', 'operator') and s.rows > 0"
        ),
    )],
};

macro_rules! requests {
    ($check:literal) => {
        concat!(
            page!(
                "*",
                "publication_request",
                "id",
                "($1::text[])[1]::uuid",
                "($3::text[])[1]::uuid"
            ),
            $check
        )
    };
}

pub(super) const REQUESTS: Table = Table {
    first: &["00000000-0000-0000-0000-000000000000"],
    end: end!("publication_request", "id", "id::text", "($1::text[])[1]::uuid"),
    removed: None,
    checks: &[
        (
            "request_off_its_attempts",
            requests!(
                "select 'request ' || r.id, case when r.attempts_removed_at is not null then 'events: counted ' || r.events
                         || ', removed attempts by verdict ' || r.verdicts || ', rows ' || a.n
                     when r.events <> a.n then 'events: counted ' || r.events || ', rows ' || a.n
                     else 'its answer and the verdicts of its events contradict each other' end
                 from page r cross join lateral (select count(*) as n, count(verdict) as verdicts from publication_attempt
                     where request_id = r.id) a
                 where case when r.attempts_removed_at is null
                     then r.events <> a.n or (r.batch_id is null and a.verdicts > 0) or (r.batch_id is not null and a.verdicts < a.n)
                     else a.n > 0 or (select coalesce(sum(value::bigint), 0) from jsonb_each_text(r.verdicts))
                         <> case when r.batch_id is null then 0 else r.events end end"
            ),
        ),
        (
            "request_off_its_events",
            requests!(
                r#"select 'request ' || id, 'its attempts are not of the events that a batch covers' from page r
                   where event_ids_sha256 is not null and attempts_removed_at is null and event_ids_sha256 <> sha256(convert_to(array(
                       select event_id from publication_attempt where request_id = r.id order by event_id collate "C")::text, 'UTF8'))"#
            ),
        ),
        (
            "row_of_no_batch",
            requests!(
                "select 'request ' || id, 'it names batch ' || named || ', which does not exist' from page r
                 cross join lateral (values (batch_id), (open_batch_id)) as batches (named)
                 where named is not null and not exists (select from batch b where b.id = named)"
            ),
        ),
    ],
};
