//! Builds and the first starts of their workspaces.

use super::page::{Table, end, page};

macro_rules! first_starts {
    ($check:literal) => {
        concat!(
            page!(
                "*",
                "workspace_first_start",
                "source_id, workspace_id",
                "($1::text[])[1]::smallint, ($1::text[])[2]::uuid",
                "($3::text[])[1]::smallint, ($3::text[])[2]::uuid"
            ),
            $check
        )
    };
}

pub(super) const FIRST_STARTS: Table = Table {
    first: &["-32768", "00000000-0000-0000-0000-000000000000"],
    end: end!(
        "workspace_first_start",
        "source_id, workspace_id",
        "source_id::text, workspace_id::text",
        "($1::text[])[1]::smallint, ($1::text[])[2]::uuid"
    ),
    removed: None,
    checks: &[
        (
            "first_start_without_its_build",
            first_starts!(
                "select 'workspace_build_completed:' || f.build_id, 'workspace ' || f.workspace_id
                     || ' has this first start, but the ledger has no such accepted build'
                 from page f where f.build_id is not null
                     and not exists (select from workspace_build b where b.source_id = f.source_id and b.build_id = f.build_id
                         and b.workspace_id = f.workspace_id and b.first_successful_start)
                     and not exists (select from correction c where c.source_id = f.source_id
                         and c.event_id = 'workspace_build_completed:' || f.build_id)"
            ),
        ),
        (
            "first_start_off_its_change",
            first_starts!(
                "select 'workspace ' || f.workspace_id, 'its first start is build ' || coalesce(f.build_id::text, 'none')
                     || ', but its newest correction has ' || coalesce(c.next_build_id::text, 'none')
                 from page f cross join lateral (select next_build_id from first_start_change c
                     where c.source_id = f.source_id and c.workspace_id = f.workspace_id order by batch_id desc limit 1) c
                 where c.next_build_id is not null and c.next_build_id is distinct from f.build_id"
            ),
        ),
    ],
};

macro_rules! builds {
    ($check:literal) => {
        concat!(
            page!(
                "source_id, build_id, workspace_id, batch_id, build_number, first_successful_start",
                "workspace_build",
                "source_id, build_id",
                "($1::text[])[1]::smallint, ($1::text[])[2]::uuid",
                "($3::text[])[1]::smallint, ($3::text[])[2]::uuid"
            ),
            $check
        )
    };
}

pub(super) const BUILDS: Table = Table {
    first: &["-32768", "00000000-0000-0000-0000-000000000000"],
    end: end!(
        "workspace_build",
        "source_id, build_id",
        "source_id::text, build_id::text",
        "($1::text[])[1]::smallint, ($1::text[])[2]::uuid"
    ),
    removed: None,
    checks: &[
        (
            "build_without_its_first_start",
            builds!(
                "select 'workspace_build_completed:' || b.build_id, 'the first start of workspace ' || b.workspace_id || ' is missing'
                 from page b where first_successful_start
                     and not exists (select from workspace_first_start f where f.source_id = b.source_id and f.workspace_id = b.workspace_id)
                     and not exists (select from correction c where c.source_id = b.source_id
                         and c.event_id = 'workspace_build_completed:' || b.build_id)"
            ),
        ),
        // the first accepted one counts, unless corrections changed it
        (
            "first_start_changed",
            builds!(
                "select 'workspace_build_completed:' || b.build_id, 'workspace ' || b.workspace_id || ' has the first start ' || f.build_id
                     || ', which was accepted later'
                 from page b join workspace_first_start f on f.source_id = b.source_id and f.workspace_id = b.workspace_id
                 join workspace_build other on other.source_id = f.source_id and other.build_id = f.build_id
                 where b.first_successful_start and f.build_id <> b.build_id
                     and ((select sequence from batch where id = b.batch_id), b.build_number)
                         < ((select sequence from batch where id = other.batch_id), other.build_number)
                     and not exists (select from correction c where c.source_id = b.source_id
                         and c.event_id = 'workspace_build_completed:' || b.build_id)
                     and not exists (select from first_start_change c where c.source_id = f.source_id and c.workspace_id = f.workspace_id)"
            ),
        ),
    ],
};
