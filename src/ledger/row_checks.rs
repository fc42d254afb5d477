//! Contradictions between rows of the ledger, which only a change by hand makes.

use sqlx::{PgConnection, Row as _};

use super::Difference;

/// Number of statements of [`differences`].
pub const STATEMENTS: u32 = CHECKS.len() as u32;

/// Contradictions between rows: publications and their usage, requests and their attempts, first
/// starts and their builds.
pub async fn differences(
    conn: &mut PgConnection,
    limit: i64,
) -> Result<Vec<Difference>, sqlx::Error> {
    let mut differences = Vec::new();
    for (kind, query) in CHECKS {
        for row in &sqlx::query(query).bind(limit).fetch_all(&mut *conn).await? {
            differences.push(Difference {
                kind: kind.into(),
                id: row.try_get(0)?,
                detail: row.try_get(1)?,
            });
        }
    }
    Ok(differences)
}

/// Each query returns (id, detail) for at most `$1` rows that disagree, normally for none.
/// `materialized` makes it plan for all rows.
const CHECKS: [(&str, &str); 11] = [
    (
        "publication_changed",
        "with found as materialized (
             select p.event_id, concat_ws(', ', case when p.event_created_at <> u.created_at then 'event_created_at' end,
                     case when p.queued_batch_id <> u.batch_id then 'queued_batch_id' end) || ': differs from its usage event'
             from publication p join usage_as_of(9223372036854775807) u on u.source_id = p.source_id and u.id = p.event_id
             where (p.event_created_at, p.queued_batch_id) <> (u.created_at, u.batch_id))
         select * from found limit $1",
    ),
    (
        "publication_off_its_settlement",
        "with found as materialized (
             select p.event_id, 'state is ' || p.state || ', but its newest settlement has ' || coalesce(s.state, 'pending')
             from publication p left join (
                 select distinct on (source_id, event_id) source_id, event_id, state from settlement join batch b on b.id = batch_id
                 order by source_id, event_id, b.sequence desc
             ) s using (source_id, event_id)
             where p.state <> coalesce(s.state, 'pending'))
         select * from found limit $1",
    ),
    (
        "settlement_of_no_publication",
        "select event_id, 'settled as ' || state || ' by batch ' || batch_id || ', but not queued' from settlement s
         where not exists (select from publication p where p.source_id = s.source_id and p.event_id = s.event_id) limit $1",
    ),
    (
        "batch_off_its_settlements",
        "with found as materialized (
             select 'batch ' || b.id, 'the batch counts ' || b.settled || ' settled without the vendor, rows ' || coalesce(s.n, 0)
             from batch b left join (
                 select batch_id, count(*) filter (where state not in ('published', 'refused')) as n from settlement group by batch_id
             ) s on s.batch_id = b.id
             where b.settled <> coalesce(s.n, 0) or b.kind not in ('verdicts', 'operator') and s.batch_id is not null)
         select * from found limit $1",
    ),
    (
        "publication_off_its_attempts",
        "with found as materialized (
             select p.event_id, 'attempts: counted ' || p.attempts || ', rows ' || coalesce(a.n, 0)
                 || case when p.removed_attempts = 0 then '' else ', removed ' || p.removed_attempts end
             from publication p left join (
                 select source_id, event_id, count(*) as n from publication_attempt group by source_id, event_id
             ) a using (source_id, event_id)
             where p.attempts <> coalesce(a.n, 0) + p.removed_attempts)
         select * from found limit $1",
    ),
    (
        "request_off_its_attempts",
        "select 'request ' || r.id, case when r.attempts_removed_at is not null then 'events: counted ' || r.events
                     || ', removed attempts by verdict ' || r.verdicts || ', rows ' || coalesce(a.n, 0)
                 when r.events <> coalesce(a.n, 0) then 'events: counted ' || r.events || ', rows ' || coalesce(a.n, 0)
                 else 'its answer and the verdicts of its events contradict each other' end
         from publication_request r left join (
             select request_id, count(*) as n, count(verdict) as verdicts from publication_attempt group by request_id
         ) a on a.request_id = r.id
         where case when r.attempts_removed_at is null
             then r.events <> coalesce(a.n, 0) or (r.batch_id is null and a.verdicts > 0) or (r.batch_id is not null and a.verdicts < a.n)
             else a.n > 0 or (select coalesce(sum(value::bigint), 0) from jsonb_each_text(r.verdicts))
                 <> case when r.batch_id is null then 0 else r.events end end limit $1",
    ),
    // Each removal by retention is counted in the ledger.
    (
        "removed_off_its_acts",
        "select kind, 'retention counts ' || counted || ' removed, rows ' || n from (
             select kind, rows + (select coalesce(sum((detail->'removed'->kind->>'rows')::bigint), 0) from operator_act where act = 'prune') as counted,
                 case kind when 'attempts' then (select coalesce(sum(removed_attempts), 0) from publication)
                     else (select count(*) from reject where payload_removed_at is not null) end as n
             from prune_kind where kind in ('attempts', 'reject_payloads')) as removed
         where counted <> n limit $1",
    ),
    (
        "first_start_without_its_build",
        "with found as materialized (
             select 'workspace_build_completed:' || f.build_id, 'workspace ' || f.workspace_id || ' has this first start, but the ledger has no such accepted build'
             from workspace_first_start f left join workspace_build b
                 on b.source_id = f.source_id and b.build_id = f.build_id and b.workspace_id = f.workspace_id and b.first_successful_start
             where f.build_id is not null and b.build_id is null
                 and not exists (select from correction c where c.source_id = f.source_id and c.event_id = 'workspace_build_completed:' || f.build_id))
         select * from found limit $1",
    ),
    (
        "build_without_its_first_start",
        "select 'workspace_build_completed:' || b.build_id, 'the first start of workspace ' || b.workspace_id || ' is missing'
         from workspace_build b left join workspace_first_start f on f.source_id = b.source_id and f.workspace_id = b.workspace_id
         where b.first_successful_start and f.workspace_id is null
             and not exists (select from correction c where c.source_id = b.source_id and c.event_id = 'workspace_build_completed:' || b.build_id) limit $1",
    ),
    (
        "reject_off_its_act",
        "with found as materialized (
             select 'reject ' || r.id, 'state is ' || r.state || ', but '
                 || coalesce('its act ' || a.id || ' is ' || a.act || ' of ' || coalesce('reject ' || a.reject_id, a.subject), 'its act is missing')
             from reject r left join operator_act a on a.id = r.act_id
             where r.state <> 'open' and (a.reject_id is distinct from r.id
                 or (a.act, r.state) not in (('resubmit', 'resubmitted'), ('admit', 'admitted'), ('discard', 'discarded'))))
         select * from found limit $1",
    ),
    (
        "row_of_no_batch",
        "select * from (
             select 'reject ' || r.id, 'it names batch ' || r.batch_id || ', which does not exist'
             from reject r where not exists (select from batch b where b.id = r.batch_id)
             union all
             select 'request ' || r.id, 'it names batch ' || r.batch_id || ', which does not exist'
             from publication_request r where r.batch_id is not null and not exists (select from batch b where b.id = r.batch_id)
         ) as found limit $1",
    ),
];
