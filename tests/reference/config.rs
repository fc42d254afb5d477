//! docs/reference/config.md: every setting.

use tallyline::config::{KEYS, Key};

use crate::table::{code, table};

const INTRODUCTION: &str = "\
# Settings

Each process reads one pipeline file in TOML. [pipelines/single.toml](../../pipelines/single.toml)
is for a small site, [pipelines/kafka.toml](../../pipelines/kafka.toml) for a large one. A setting
can be given in three ways. Each takes precedence over the next one:

1. a flag, `--set ledger.connections=20`
2. a variable of the environment, `TALLYLINE_LEDGER_CONNECTIONS=20`
3. the file

Without any of them, the default applies. `tallyline check --pipeline FILE` lists every mistake with
its place. An unknown key is a mistake.

A flag or a variable gives a list as words separated by commas, and a whole table as an inline table
of TOML: `{ \"NAME\" = \"VALUE\" }`. A flag can also set one entry of a table,
`--set serve.tokens.oncall=VALUE`, and a variable one of Kafka's properties,
`TALLYLINE_KAFKA_PROPERTIES_SASL_PASSWORD=VALUE`.

## Secrets

A secret setting accepts one of these forms. The first three keep the secret out of the file.

| form | the secret |
| --- | --- |
| `env:NAME` | the value of a variable of the environment |
| `file:PATH` | the content of a file |
| `exec:COMMAND` | the output of a program, with arguments separated by blanks and without a shell |
| any other text | the text itself |

Blanks and line ends around a secret are removed. A secret is read again after a server has refused
it. It is not shown in logs, messages and answers.
";

pub fn page() -> String {
    let mut sections: Vec<(&str, Vec<&Key>)> = Vec::new();
    for key in KEYS {
        let section = key.name.split_once('.').map_or("roles", |(section, _)| section);
        match sections.last_mut() {
            Some((last, keys)) if *last == section => keys.push(key),
            _ => sections.push((section, vec![key])),
        }
    }
    let mut page = INTRODUCTION.to_owned();
    for (section, keys) in sections {
        let heads = ["key", "values", "default", "variable", "secret", "effect"];
        page += &format!("\n## {section}\n\n{}", table(heads, keys.into_iter().map(row)));
    }
    page
}

fn row(key: &Key) -> [String; 6] {
    let default = match key.default {
        Some("") => "empty".to_owned(),
        Some(default) => code(default),
        None if key.doc.contains("Default: ") => "see effect".to_owned(),
        None => "none".to_owned(),
    };
    let secret = if key.kind.may_be_secret() { "yes" } else { "no" };
    [
        code(key.name),
        key.kind.allowed(),
        default,
        code(&key.variable()),
        secret.to_owned(),
        key.doc.to_owned(),
    ]
}
