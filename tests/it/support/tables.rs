//! The content of every table, to check that nothing changed.

use std::collections::BTreeMap;

use sqlx::PgPool;

/// The number of rows of each table of the ledger and the log, and the hash of all of them.
pub async fn tables(pool: &PgPool) -> BTreeMap<String, (i64, String)> {
    let names: Vec<String> = sqlx::query_scalar(
        "select table_name::text from information_schema.tables where table_schema = 'public'",
    )
    .fetch_all(pool)
    .await
    .expect("list tables");
    let mut tables = BTreeMap::new();
    for name in names {
        let rows = format!(
            "select count(*), coalesce(md5(string_agg(one::text, E'\\n' order by one::text)), '') from \"{name}\" one"
        );
        let counted: (i64, String) =
            sqlx::query_as(sqlx::AssertSqlSafe(rows)).fetch_one(pool).await.expect("read a table");
        tables.insert(name, counted);
    }
    assert!(tables.len() > 20, "{tables:?}");
    tables
}
