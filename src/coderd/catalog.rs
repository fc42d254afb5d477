//! What this version of coderd has. It is read before any column is named.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::FromRow;

use super::connect::within;
use super::functions::{Access, Function, JOB_STAGES, OLDEST_TRANSACTION, access, statements};
use super::{CoderdError, Reader};

/// Columns that every supported version has. The grants name the same ones.
const REQUIRED: &[(&str, &[&str])] = &[
    (
        "provisioner_jobs",
        &[
            "id",
            "created_at",
            "started_at",
            "completed_at",
            "organization_id",
            "type",
            "worker_id",
            "job_status",
        ],
    ),
    (
        "workspace_builds",
        &[
            "id",
            "workspace_id",
            "template_version_id",
            "build_number",
            "transition",
            "initiator_id",
            "job_id",
            "reason",
            "daily_cost",
            "template_version_preset_id",
            "has_external_agent",
        ],
    ),
    ("workspaces", &["id", "owner_id", "organization_id", "template_id", "name"]),
    ("organizations", &["id", "name"]),
    ("templates", &["id", "name"]),
    ("template_versions", &["id", "name"]),
    ("template_version_presets", &["id", "name"]),
    ("users", &["id", "username"]),
    ("licenses", &["id", "uploaded_at", "jwt", "exp", "uuid"]),
];

/// Columns that depend on coderd's version (reference 0.5). A column that exists but is not granted
/// is an error: its values would silently be missing.
const OPTIONAL: &[(&str, &[&str])] = &[
    ("workspace_builds", &["has_ai_task"]),
    (
        "usage_events",
        &[
            "id",
            "event_type",
            "event_data",
            "created_at",
            "publish_started_at",
            "published_at",
            "failure_message",
        ],
    ),
];

/// Columns that identify the deployment. Without a right on them, builds and usage are still
/// collected.
const IDENTITY: &[(&str, &[&str])] = &[("organizations", &["is_default"])];

/// What this deployment offers to the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalog {
    /// `workspace_builds.has_ai_task`: June 2025 to September 2026
    pub has_ai_task: bool,
    /// `usage_events`: since August 2025
    pub usage_events: bool,
    /// The usage types that the database accepts, as its CHECK names them; empty when that could
    /// not be read
    pub usage_types: Vec<String>,
    /// How the stages of builds are read
    pub(super) stages: Access,
    /// How open transactions are read; None: completeness is not reported
    pub(super) open_transactions: Option<Access>,
}

impl Catalog {
    /// Missing parts, in words for the log.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if !self.has_ai_task {
            missing.push("workspace_builds.has_ai_task (before June 2025 or after Tasks were removed): AI task flags are absent");
        }
        if !self.usage_events {
            missing.push("usage_events (before August 2025): no usage is collected");
        }
        missing
    }

    #[must_use]
    pub fn sees_transactions(&self) -> bool {
        self.open_transactions.is_some()
    }

    /// Whether this coderd can have hourly rows of agent runtime.
    #[must_use]
    pub fn has_runtime(&self) -> bool {
        self.usage_events && self.usage_types.iter().any(|name| name == "hb_agent_runtime_v1")
    }
}

#[derive(FromRow)]
struct ColumnRow {
    table_name: String,
    column_name: String,
    table_there: bool,
    /// Whether the role may use the schema of the table.
    schema_usable: bool,
    column_there: bool,
    readable: bool,
}

impl Reader {
    /// Reads which columns exist and which the role may read.
    ///
    /// It uses `pg_attribute`: `information_schema` hides columns without a grant, and a missing
    /// right must not look like a missing column.
    ///
    /// # Errors
    /// [`CoderdError::Missing`] and [`CoderdError::NotGranted`], each with all that is missing.
    pub async fn catalog(&mut self) -> Result<Catalog, CoderdError> {
        let (columns, functions) =
            (self.columns(&[REQUIRED, OPTIONAL]).await?, self.functions().await?);
        let stages = check(&columns, &functions, &self.user)?;
        let has = |table: &str, column: &str| {
            columns
                .iter()
                .any(|row| row.table_name == table && row.column_name == column && row.column_there)
        };
        Ok(Catalog {
            has_ai_task: has("workspace_builds", "has_ai_task"),
            usage_events: has("usage_events", "id"),
            usage_types: self.usage_types().await?,
            stages,
            open_transactions: access(&functions, OLDEST_TRANSACTION),
        })
    }

    /// The statements that grant the missing rights, including those without which less is
    /// reported.
    ///
    /// # Errors
    /// [`CoderdError::Missing`] with all missing columns.
    pub async fn missing_rights(&mut self) -> Result<Vec<String>, CoderdError> {
        let (columns, functions) =
            (self.columns(&[REQUIRED, OPTIONAL, IDENTITY]).await?, self.functions().await?);
        present(&columns)?;
        Ok(lacking(&columns, &functions, &self.user))
    }

    /// Why the role cannot read these columns, and what to do. None: it can read them.
    pub(super) async fn lacking_columns(
        &mut self,
        wanted: &[(&str, &[&str])],
    ) -> Result<Option<String>, CoderdError> {
        let columns = self.columns(&[wanted]).await?;
        if let Some(absent) = columns.iter().find(|one| !one.column_there) {
            return Ok(Some(format!("{}.{} is missing", absent.table_name, absent.column_name)));
        }
        let grants = lacking(&columns, [], &self.user);
        Ok((!grants.is_empty())
            .then(|| format!("let an administrator run:\n{}", grants.join("\n"))))
    }

    /// Also finds a table whose schema the role may not use: coderd's tables are in `public`.
    async fn columns(
        &mut self,
        wanted: &[&[(&str, &[&str])]],
    ) -> Result<Vec<ColumnRow>, CoderdError> {
        let all = wanted
            .iter()
            .copied()
            .flatten()
            .flat_map(|(table, columns)| columns.iter().map(move |column| (*table, *column)));
        let (tables, columns): (Vec<&str>, Vec<&str>) = all.unzip();
        let query = sqlx::query_as(
            "select wanted.table_name, wanted.column_name, relation.oid is not null as table_there,
                     to_regclass(wanted.table_name) is not null as schema_usable, there.attnum is not null as column_there,
                     coalesce(has_column_privilege(there.attrelid, there.attnum, 'select'), false) as readable
                 from unnest($1::text[], $2::text[]) as wanted (table_name, column_name)
                 left join pg_namespace schema on schema.nspname = 'public' and not has_schema_privilege(schema.oid, 'usage')
                 left join pg_class hidden on hidden.relnamespace = schema.oid and hidden.relname = wanted.table_name
                 left join lateral (select coalesce(to_regclass(wanted.table_name)::oid, hidden.oid)) as relation (oid) on true
                 left join pg_attribute there
                     on there.attrelid = relation.oid and there.attname = wanted.column_name and not there.attisdropped",
        )
        .bind(&tables)
        .bind(&columns);
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }

    /// The quoted words in CHECK `usage_event_type_check`: the usage types that this database
    /// accepts.
    async fn usage_types(&mut self) -> Result<Vec<String>, CoderdError> {
        let query = sqlx::query_scalar(
            "select pg_get_constraintdef(oid) from pg_constraint
             where conrelid = to_regclass('usage_events') and conname = 'usage_event_type_check'",
        );
        let check: Option<String> =
            within(self.deadline, query.fetch_optional(&mut self.connection)).await?;
        Ok(quoted(&check.unwrap_or_default()))
    }
}

fn quoted(text: &str) -> Vec<String> {
    text.split('\'').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Fails if builds cannot be read. Otherwise returns how their stages are read.
fn check(rows: &[ColumnRow], functions: &[Function], user: &str) -> Result<Access, CoderdError> {
    present(rows)?;
    let grants =
        lacking(rows, functions.iter().filter(|function| function.name == JOB_STAGES), user);
    match access(functions, JOB_STAGES) {
        Some(stages) if grants.is_empty() => Ok(stages),
        _ => Err(CoderdError::NotGranted { grants }),
    }
}

/// Fails if a required table or column is missing.
fn present(rows: &[ColumnRow]) -> Result<(), CoderdError> {
    let optional = |one: &ColumnRow| {
        OPTIONAL.iter().any(|(table, columns)| {
            *table == one.table_name && columns.contains(&one.column_name.as_str())
        })
    };
    // An optional table that exists must have all its columns.
    let absent = rows.iter().filter(|one| {
        !one.column_there
            && (!optional(one) || (one.table_name == "usage_events" && one.table_there))
    });
    let names: BTreeSet<String> = absent
        .map(|one| {
            if one.table_there {
                format!("{}.{}", one.table_name, one.column_name)
            } else {
                one.table_name.clone()
            }
        })
        .collect();
    if names.is_empty() {
        Ok(())
    } else {
        Err(CoderdError::Missing { names: names.into_iter().collect() })
    }
}

/// The statements that grant the rights that `user` lacks.
fn lacking<'a>(
    rows: &[ColumnRow],
    functions: impl IntoIterator<Item = &'a Function>,
    user: &str,
) -> Vec<String> {
    let mut columns: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for one in rows.iter().filter(|one| one.column_there && !one.readable) {
        columns.entry(&one.table_name).or_default().push(&one.column_name);
    }
    let hidden = rows.iter().any(|one| one.table_there && !one.schema_usable);
    let schema = hidden.then(|| format!("grant usage on schema public to {user};"));
    let grant = |(table, columns): (&str, Vec<&str>)| {
        format!("grant select ({}) on {table} to {user};", columns.join(", "))
    };
    schema
        .into_iter()
        .chain(columns.into_iter().map(grant))
        .chain(statements(functions, user))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column_row(
        table: &str,
        column: &str,
        table_there: bool,
        column_there: bool,
        readable: bool,
    ) -> ColumnRow {
        ColumnRow {
            table_name: table.into(),
            column_name: column.into(),
            table_there,
            schema_usable: table_there,
            column_there,
            readable,
        }
    }

    fn stages() -> Function {
        Function {
            name: JOB_STAGES.into(),
            present: true,
            schema_usable: true,
            executable: true,
            tables_readable: false,
        }
    }

    #[test]
    fn an_error_names_a_missing_required_column() {
        assert!(
            check(
                &[column_row("workspace_builds", "has_ai_task", true, false, false)],
                &[stages()],
                "reader"
            )
            .is_ok()
        );
        assert!(
            check(&[column_row("usage_events", "id", false, false, false)], &[stages()], "reader")
                .is_ok()
        );
        let error = check(
            &[column_row("workspace_builds", "reason", true, false, false)],
            &[stages()],
            "reader",
        )
        .unwrap_err();
        assert!(error.to_string().contains("lacks workspace_builds.reason"), "{error}");
        let error = check(
            &[column_row("usage_events", "published_at", true, false, false)],
            &[stages()],
            "reader",
        )
        .unwrap_err();
        assert!(error.to_string().contains("usage_events.published_at"), "{error}");
    }

    #[test]
    fn an_error_contains_the_grant_for_a_missing_right() {
        let rows = [
            column_row("users", "id", true, true, false),
            column_row("users", "username", true, true, false),
            column_row("licenses", "jwt", true, true, true),
        ];
        let error = check(&rows, &[stages()], "reader").unwrap_err();
        assert!(
            error.to_string().ends_with("grant select (id, username) on users to reader;"),
            "{error}"
        );
    }

    #[test]
    fn an_unusable_schema_needs_a_grant_and_is_not_a_missing_table() {
        let hidden = |column: &str| ColumnRow {
            schema_usable: false,
            ..column_row("users", column, true, true, true)
        };
        let error = check(&[hidden("id"), hidden("username")], &[stages()], "reader").unwrap_err();
        assert!(
            matches!(&error, CoderdError::NotGranted { grants } if grants == &["grant usage on schema public to reader;"]),
            "{error}"
        );
    }

    #[test]
    fn an_error_names_a_missing_table_once() {
        let rows =
            [("users", "id"), ("workspaces", "id"), ("users", "username"), ("workspaces", "name")];
        let rows = rows.map(|(table, column)| column_row(table, column, false, false, false));
        let error = check(&rows, &[stages()], "reader").unwrap_err();
        assert!(
            matches!(&error, CoderdError::Missing { names } if names == &["users", "workspaces"]),
            "{error}"
        );
    }

    #[test]
    fn an_optional_column_without_a_grant_is_an_error() {
        assert!(
            check(
                &[column_row("workspace_builds", "has_ai_task", true, true, false)],
                &[stages()],
                "reader"
            )
            .is_err()
        );
    }

    #[test]
    fn grants_cover_every_column_that_is_read() {
        let script = crate::coderd::grants("reader");
        for (table, columns) in REQUIRED.iter().chain(OPTIONAL).chain(IDENTITY) {
            for column in *columns {
                let granted = script.lines().any(|line| {
                    let Some((list, rest)) = line.split_once(") on ") else { return false };
                    rest.starts_with(&format!("{table} "))
                        && list.split([' ', '(', ',']).any(|word| word == *column)
                });
                assert!(granted, "{table}.{column} is read but not granted");
            }
        }
    }

    #[test]
    fn usage_types_come_from_the_check_constraint() {
        let check = "CHECK ((event_type = ANY (ARRAY['dc_managed_agents_v1'::text, 'hb_ai_seats_v1'::text])))";
        assert_eq!(quoted(check), ["dc_managed_agents_v1", "hb_ai_seats_v1"]);
        assert!(quoted("").is_empty());
    }
}
