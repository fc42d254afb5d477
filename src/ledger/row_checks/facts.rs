//! Rows that follow from an operator's act, and rows of small tables.

use super::page::{Table, end, page};

/// Usage that is left out of comparisons with coderd.
pub(super) const GONE_USAGE: Table = Table {
    first: &["-32768", ""],
    end: end!(
        "(select source_id, id from usage_event where gone_at is not null) as gone",
        "source_id, id",
        "source_id::text, id",
        "($1::text[])[1]::smallint, ($1::text[])[2]"
    ),
    removed: None,
    checks: &[(
        "gone_off_its_act",
        concat!(
            page!(
                "source_id, id",
                "(select source_id, id from usage_event where gone_at is not null) as gone",
                "source_id, id",
                "($1::text[])[1]::smallint, ($1::text[])[2]",
                "($3::text[])[1]::smallint, ($3::text[])[2]"
            ),
            "select id, 'it is marked as gone from coderd, but no act `recover` lists it as lost' from page u
             where not exists (select from source_lost l where l.source_id = u.source_id and l.event_id = u.id)"
        ),
    )],
};

pub(super) const LOST: Table = Table {
    first: &["-32768", ""],
    end: end!(
        "source_lost",
        "source_id, event_id",
        "source_id::text, event_id",
        "($1::text[])[1]::smallint, ($1::text[])[2]"
    ),
    removed: None,
    checks: &[(
        "lost_off_its_act",
        concat!(
            page!(
                "*",
                "source_lost",
                "source_id, event_id",
                "($1::text[])[1]::smallint, ($1::text[])[2]",
                "($3::text[])[1]::smallint, ($3::text[])[2]"
            ),
            "select event_id, 'it is listed as lost, but act ' || act_id || ' in batch ' || batch_id || ' is not `recover`' from page l
             where not exists (select from operator_act a join batch b on b.id = a.batch_id
                 where a.id = l.act_id and a.batch_id = l.batch_id and a.act = 'recover')"
        ),
    )],
};

/// Tables that stay small, in one page.
pub(super) const OTHERS: Table = Table {
    first: &[],
    end: "select '{}'::text[], 1::bigint from (select $1::text[], $2::boolean, $3::bigint) as unused",
    removed: None,
    checks: &[
        (
            "retired_off_its_act",
            "with bounds as (select $1::text[], $2::boolean, $3::text[])
             select 'source ' || s.deployment_id, 'its retirement is act ' || coalesce(s.retired_act_id::text, 'none')
                 || ', but its newest act is ' || coalesce(a.act || ' ' || a.id, 'none')
             from bounds, source s left join lateral (select id, act from operator_act where act in ('retire', 'reinstate')
                 and reject_id is null and subject = s.deployment_id::text order by id desc limit 1) a on true
             where s.retired_act_id is distinct from case when a.act = 'retire' then a.id end",
        ),
        (
            "cutover_off_its_act",
            "with bounds as (select $1::text[], $2::boolean, $3::text[]),
             noted as (select o.* from operator_act, jsonb_to_recordset(detail -> 'offsets')
                     as o (topic text, partition integer, generation integer, first_offset bigint)
                 where act = 'sign' and reject_id is null)
             select topic || '/' || partition || '@' || generation, 'records need a signature from offset '
                 || coalesce(c.first_offset::text, 'none') || ', but the act `sign` has ' || coalesce(n.first_offset::text, 'none')
             from bounds cross join signature_cutover c full join noted n using (topic, partition, generation)
             where c.first_offset is null or n.first_offset is null or c.first_offset > n.first_offset",
        ),
        (
            "row_of_no_batch",
            "with bounds as (select $1::text[], $2::boolean, $3::text[])
             select name, 'it names batch ' || batch_id || ', which does not exist' from bounds, (
                 select 'license ' || license_id || ' of source ' || source_id as name, batch_id from license
                 union all select 'source ' || deployment_id, batch_id from source
                 union all select 'baseline of ' || organization_name, batch_id from creation_baseline
                 union all select 'correction of ' || event_id, batch_id from correction
                 union all select 'first start of workspace ' || workspace_id, batch_id from first_start_change) as named
             where not exists (select from batch b where b.id = named.batch_id)",
        ),
    ],
};
