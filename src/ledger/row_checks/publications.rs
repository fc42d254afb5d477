//! Publications with their usage, settlements and attempts.

use super::page::{Table, end, page};

macro_rules! publications {
    ($check:literal) => {
        concat!(
            page!(
                "*",
                "publication",
                "source_id, event_id",
                "($1::text[])[1]::smallint, ($1::text[])[2]",
                "($3::text[])[1]::smallint, ($3::text[])[2]"
            ),
            $check
        )
    };
}

pub(super) const PUBLICATIONS: Table = Table {
    first: &["-32768", ""],
    end: end!(
        "publication",
        "source_id, event_id",
        "source_id::text, event_id",
        "($1::text[])[1]::smallint, ($1::text[])[2]"
    ),
    removed: Some((0, publications!("select coalesce(sum(removed_attempts), 0)::bigint from page"))),
    checks: &[
        (
            "publication_changed",
            publications!(
                "select p.event_id, concat_ws(', ', case when p.event_created_at <> now.created_at then 'event_created_at' end,
                     case when p.queued_batch_id <> u.batch_id then 'queued_batch_id' end) || ': differs from its usage event'
                 from page p join usage_event u on u.source_id = p.source_id and u.id = p.event_id
                 left join lateral (select after_event from correction c where c.source_id = p.source_id and c.event_id = p.event_id
                     order by batch_id desc limit 1) c on true
                 cross join lateral (select coalesce((c.after_event ->> 'time')::timestamptz, u.created_at) as created_at) now
                 where (p.event_created_at, p.queued_batch_id) <> (now.created_at, u.batch_id)"
            ),
        ),
        (
            "publication_off_its_settlement",
            publications!(
                "select p.event_id, 'state is ' || p.state || ', but its newest settlement has ' || coalesce(s.state, 'pending')
                 from page p left join lateral (select s.state from settlement s join batch b on b.id = s.batch_id
                     where s.source_id = p.source_id and s.event_id = p.event_id order by b.sequence desc limit 1) s on true
                 where p.state <> coalesce(s.state, 'pending')"
            ),
        ),
        (
            "publication_off_its_attempts",
            publications!(
                "select p.event_id, 'attempts: counted ' || p.attempts || ', rows ' || a.n
                     || case when p.removed_attempts = 0 then '' else ', removed ' || p.removed_attempts end
                 from page p cross join lateral (select count(*) as n from publication_attempt a
                     where a.source_id = p.source_id and a.event_id = p.event_id) a
                 where p.attempts <> a.n + p.removed_attempts"
            ),
        ),
        // the vendor may have accepted an attempt without a verdict
        (
            "publication_off_its_open_attempts",
            publications!(
                "select p.event_id, 'state is ' || p.state || ', but it does not show that the answer to an attempt is not recorded'
                 from page p where (p.state = 'pending' and not unanswered or p.state in ('expired', 'withdrawn'))
                     and exists (select from publication_attempt a where a.source_id = p.source_id and a.event_id = p.event_id
                         and a.verdict is null)"
            ),
        ),
    ],
};

macro_rules! settlements {
    ($check:literal) => {
        concat!(
            page!(
                "*",
                "settlement",
                "source_id, event_id, batch_id",
                "($1::text[])[1]::smallint, ($1::text[])[2], ($1::text[])[3]::bigint",
                "($3::text[])[1]::smallint, ($3::text[])[2], ($3::text[])[3]::bigint"
            ),
            $check
        )
    };
}

pub(super) const SETTLEMENTS: Table = Table {
    first: &["-32768", "", "-9223372036854775808"],
    end: end!(
        "settlement",
        "source_id, event_id, batch_id",
        "source_id::text, event_id, batch_id::text",
        "($1::text[])[1]::smallint, ($1::text[])[2], ($1::text[])[3]::bigint"
    ),
    removed: None,
    checks: &[
        (
            "settlement_of_no_publication",
            settlements!(
                "select event_id, 'settled as ' || state || ' by batch ' || batch_id || ', but not queued' from page s
                 where not exists (select from publication p where p.source_id = s.source_id and p.event_id = s.event_id)"
            ),
        ),
        (
            "row_of_no_batch",
            settlements!(
                "select 'settlement of ' || event_id, 'it names batch ' || batch_id || ', which does not exist' from page s
                 where not exists (select from batch b where b.id = s.batch_id)"
            ),
        ),
    ],
};
