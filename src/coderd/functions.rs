//! The functions of `grants.sql`. They return single values of tables that a reader has no right
//! on. A role that may read the tables, such as coderd's own, needs no function.

use sqlx::FromRow;

use super::connect::within;
use super::{CoderdError, Reader};

/// The prebuild stages of the jobs of workspace builds.
pub(super) const JOB_STAGES: &str = "job_stages";
/// coderd's deployment id.
pub(super) const DEPLOYMENT_ID: &str = "deployment_id";
/// When the oldest open transaction began.
pub(super) const OLDEST_TRANSACTION: &str = "oldest_transaction";

/// Each function with its arguments.
const FUNCTIONS: [(&str, &str); 3] =
    [(JOB_STAGES, "uuid[]"), (DEPLOYMENT_ID, ""), (OLDEST_TRANSACTION, "")];

/// How the role reads the values of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// From the function.
    Function,
    /// From the tables that the function reads.
    Tables,
}

/// The rights of a reader, as a script for `psql`.
const GRANTS: &str = include_str!("grants.sql");

/// `grants.sql` for this role, without psql's own commands.
#[must_use]
pub fn grants(role: &str) -> String {
    let sql: Vec<&str> = GRANTS.lines().filter(|line| !line.starts_with('\\')).collect();
    let (name, text) = (role.replace('"', "\"\""), role.replace('\'', "''"));
    sql.join("\n")
        .replace(":\"reader\"", &format!("\"{name}\""))
        .replace(":'reader'", &format!("'{text}'"))
}

/// The role's rights on one of the functions.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) present: bool,
    pub(super) schema_usable: bool,
    pub(super) executable: bool,
    /// Whether the role may read the tables that the function reads.
    pub(super) tables_readable: bool,
}

impl Function {
    /// None: the role cannot read the values.
    fn access(&self) -> Option<Access> {
        match self.present && self.schema_usable && self.executable {
            true => Some(Access::Function),
            false => self.tables_readable.then_some(Access::Tables),
        }
    }
}

/// How the role reads the values of this function. None: it cannot.
pub(super) fn access(functions: &[Function], name: &str) -> Option<Access> {
    functions.iter().find(|function| function.name == name).and_then(Function::access)
}

/// The statements that make these functions usable for `user`.
pub(super) fn statements<'a>(
    functions: impl IntoIterator<Item = &'a Function>,
    user: &str,
) -> Vec<String> {
    let unusable: Vec<&Function> =
        functions.into_iter().filter(|function| function.access().is_none()).collect();
    if unusable.iter().any(|function| !function.present) {
        return vec![format!(
            "psql --set reader={user} --file src/coderd/grants.sql CODERD_DATABASE_URL"
        )];
    }
    let mut statements = Vec::new();
    if unusable.iter().any(|function| !function.schema_usable) {
        statements.push(format!("grant usage on schema tallyline to {user};"));
    }
    for function in unusable.iter().filter(|function| !function.executable) {
        let arguments = FUNCTIONS
            .iter()
            .find(|(name, _)| *name == function.name)
            .map_or("", |(_, arguments)| *arguments);
        statements.push(format!(
            "grant execute on function tallyline.{}({arguments}) to {user};",
            function.name
        ));
    }
    statements
}

impl Reader {
    /// Reads which functions exist, which the role may call, and which tables it may read without
    /// them. It reads the catalog itself: a cast to `regprocedure` fails without the right to use
    /// the schema.
    pub(super) async fn functions(&mut self) -> Result<Vec<Function>, CoderdError> {
        let names = FUNCTIONS.map(|(name, _)| name);
        let query = sqlx::query_as(
            "select wanted.name, function.oid is not null as present, coalesce(has_schema_privilege(schema.oid, 'usage'), false) as schema_usable,
                 coalesce(has_function_privilege(function.oid, 'execute'), false) as executable,
                 case wanted.name
                     when 'job_stages' then (
                         select count(*) = 1 from pg_attribute where attrelid = to_regclass('provisioner_jobs') and attname = 'input'
                             and has_column_privilege(attrelid, attnum, 'select'))
                     when 'deployment_id' then (
                         select count(*) = 2 from pg_attribute where attrelid = to_regclass('site_configs') and attname in ('key', 'value')
                             and has_column_privilege(attrelid, attnum, 'select'))
                     else pg_has_role('pg_read_all_stats', 'usage')
                 end as tables_readable
             from unnest($1::text[]) as wanted (name)
             left join pg_namespace schema on schema.nspname = 'tallyline'
             left join pg_proc function on function.pronamespace = schema.oid and function.proname = wanted.name",
        );
        within(self.deadline, query.bind(&names[..]).fetch_all(&mut self.connection)).await
    }

    /// How the role now reads the values of this function. None: it cannot.
    pub(super) async fn access(&mut self, name: &str) -> Result<Option<Access>, CoderdError> {
        Ok(access(&self.functions().await?, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, present: bool, schema_usable: bool, executable: bool) -> Function {
        Function { name: name.into(), present, schema_usable, executable, tables_readable: false }
    }

    #[test]
    fn grants_are_for_the_requested_role() {
        let script = grants("Ops \"night\" o'clock");
        assert!(script.contains("on users to \"Ops \"\"night\"\" o'clock\";"), "{script}");
        assert!(script.contains("set tallyline.reader = 'Ops \"night\" o''clock';"), "{script}");
        assert!(
            !script.contains("\n\\") && !script.contains(":\"") && !script.contains(":'"),
            "{script}"
        );
    }

    #[test]
    fn an_unusable_function_needs_a_grant_or_the_script() {
        let usable = function(DEPLOYMENT_ID, true, true, true);
        assert!(statements([&usable], "reader").is_empty());
        let missing = function(JOB_STAGES, false, false, false);
        let expected =
            ["psql --set reader=reader --file src/coderd/grants.sql CODERD_DATABASE_URL"];
        assert_eq!(statements([&usable, &missing], "reader"), expected);
        let denied = function(JOB_STAGES, true, false, false);
        let expected = [
            "grant usage on schema tallyline to reader;",
            "grant execute on function tallyline.job_stages(uuid[]) to reader;",
        ];
        assert_eq!(statements([&usable, &denied], "reader"), expected);
    }

    #[test]
    fn a_role_with_table_rights_needs_no_function() {
        let missing = function(JOB_STAGES, false, false, false);
        assert_eq!(missing.access(), None);
        let readable = Function { tables_readable: true, ..missing };
        assert_eq!(readable.access(), Some(Access::Tables));
        assert!(statements([&readable], "reader").is_empty());
        let usable = Function { present: true, schema_usable: true, executable: true, ..readable };
        assert_eq!(usable.access(), Some(Access::Function));
    }
}
