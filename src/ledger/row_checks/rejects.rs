//! Rejects with the acts that ended them, and the batches of acts.

use super::page::{Table, end, page};

macro_rules! rejects {
    ($check:literal) => {
        concat!(
            page!(
                "id, batch_id, replay_batch_id, state, act_id, payload_removed_at",
                "reject",
                "id",
                "($1::text[])[1]::bigint",
                "($3::text[])[1]::bigint"
            ),
            $check
        )
    };
}

pub(super) const REJECTS: Table = Table {
    first: &["-9223372036854775808"],
    end: end!("reject", "id", "id::text", "($1::text[])[1]::bigint"),
    removed: Some((
        1,
        rejects!("select count(*) from page where payload_removed_at is not null"),
    )),
    checks: &[
        (
            "reject_off_its_act",
            rejects!(
                "select 'reject ' || r.id, 'state is ' || r.state || ', but '
                     || coalesce('its act ' || a.id || ' is ' || a.act || ' of ' || coalesce('reject ' || a.reject_id, a.subject), 'its act is missing')
                 from page r left join lateral (select * from operator_act where id = r.act_id) a on true
                 where r.state <> 'open' and (a.reject_id is distinct from r.id
                     or (a.act, r.state) not in (('resubmit', 'resubmitted'), ('admit', 'admitted'), ('discard', 'discarded')))"
            ),
        ),
        // retention removes only what an act ended before
        (
            "reject_removed_early",
            rejects!(
                "select 'reject ' || r.id, 'state is ' || r.state || ', but its headers and body were removed at ' || r.payload_removed_at
                     || coalesce(', before its act ' || r.act_id, '')
                 from page r where r.payload_removed_at is not null
                     and (r.state = 'open' or r.payload_removed_at <= (select acted_at from operator_act where id = r.act_id))"
            ),
        ),
        (
            "row_of_no_batch",
            rejects!(
                "select 'reject ' || id, 'it names batch ' || named || ', which does not exist' from page r
                 cross join lateral (values (batch_id), (replay_batch_id)) as batches (named)
                 where named is not null and not exists (select from batch b where b.id = named)"
            ),
        ),
    ],
};

pub(super) const ACTS: Table = Table {
    first: &["-9223372036854775808"],
    end: end!("operator_act", "id", "id::text", "($1::text[])[1]::bigint"),
    removed: None,
    checks: &[(
        "row_of_no_batch",
        concat!(
            page!("id, batch_id", "operator_act", "id", "($1::text[])[1]::bigint", "($3::text[])[1]::bigint"),
            "select 'act ' || id, 'it names batch ' || batch_id || ', which does not exist' from page a
             where not exists (select from batch b where b.id = a.batch_id)"
        ),
    )],
};
