//! The rights that Tallyline's role needs in the ledger's database.

use sqlx::PgConnection;

use super::migrations::MIGRATIONS;

/// The names of all tables and views in the migrations. Other tables of the database do not belong
/// to Tallyline.
fn tables() -> Vec<&'static str> {
    let lines = MIGRATIONS.iter().flat_map(|migration| migration.sql.as_str().lines());
    lines
        .filter_map(|line| {
            line.strip_prefix("create table ").or_else(|| line.strip_prefix("create view "))
        })
        .map(|rest| rest.split([' ', '(']).next().unwrap_or_default())
        .collect()
}

/// The rights that the role lacks in the ledger's database, each as the statement that grants it.
/// `creates` includes the right to create tables. Names are resolved by the role's `search_path`,
/// as in its statements.
pub async fn missing(conn: &mut PgConnection, creates: bool) -> Result<Vec<String>, sqlx::Error> {
    // Only the sequence of `batch` is called by name. The other sequences need no right of their
    // own.
    sqlx::query_scalar(
        r#"with path as (
             select replace(trim(both ' "' from entry), '$user', current_user) as schema_name, number
             from unnest(string_to_array(current_setting('search_path'), ',')) with ordinality as path (entry, number)
         )
         (select case when nspname is null then format('create schema %I authorization %I;', schema_name, current_user)
                 else format('grant usage on schema %I to %I;', schema_name, current_user) end
          from path left join pg_namespace on nspname = schema_name
          where current_schema() is null order by nspname is null, number limit 1)
         union all
         select format('grant create on schema %I to %I;', current_schema(), current_user)
         where $1 and not has_schema_privilege(current_schema(), 'create')
         union all
         select format('grant select on %s to %I;', migrations, current_user) from to_regclass($3) as migrations
         where not has_table_privilege(migrations, 'select')
         union all
         select format('grant select, insert, update, delete on %s to %I;', name::regclass, current_user) from unnest($2::text[]) as name
         where to_regclass(name) is not null
             and not (has_table_privilege(to_regclass(name), 'select') and has_table_privilege(to_regclass(name), 'insert')
                 and has_table_privilege(to_regclass(name), 'update') and has_table_privilege(to_regclass(name), 'delete'))
         union all
         select format('grant usage on sequence %s to %I;', name, current_user)
         from pg_get_serial_sequence(to_regclass('batch')::text, 'id') as name
         where not has_sequence_privilege(name, 'usage, update')"#,
    )
    .bind(creates)
    .bind(tables())
    .bind(&*MIGRATIONS.table_name)
    .fetch_all(conn)
    .await
}
