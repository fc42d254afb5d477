//! docs/reference/api.md: every path of both listeners, from their OpenAPI documents.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use tallyline::api::{api_document, metrics_document};

use crate::table::{code, codes, link, table, wrapped};

const INTRODUCTION: &str = "\
# API

A process with the role `serve` answers the paths below at `serve.api_listen`, and `/metrics` at
`serve.metrics_listen`. `/healthz` and `/readyz` are at both addresses. `GET /openapi.json` returns
the same content as a document. [For coderd](../coderd-api.md) has examples.
";

/// One operation of the document.
struct Operation<'a> {
    method: String,
    path: &'a str,
    content: &'a Value,
}

/// The named types of the document.
struct Types<'a>(&'a Map<String, Value>);

/// A field of a type.
struct Field {
    kind: String,
    required: bool,
    meaning: String,
}

pub fn page() -> String {
    let mut document = json!(api_document());
    let metrics = json!(metrics_document())["paths"].take();
    let paths = document["paths"].as_object_mut().unwrap();
    for (path, item) in metrics.as_object().unwrap() {
        paths.entry(path).or_insert_with(|| item.clone());
    }
    let components = &document["components"];
    let types = Types(components["schemas"].as_object().unwrap());
    let operations = operations(&document);
    let rows = operations.iter().map(|operation| {
        let name = operation.name();
        [link(&code(&name), &name), operation.scope(), text(&operation.content["summary"])]
    });
    let mut page = [
        INTRODUCTION,
        &prose(&[&document["info"]["description"]]),
        &prose(&[&components["securitySchemes"]["token"]["description"]]),
        &table(["path", "scope", "effect"], rows),
        &errors(&operations, &types),
    ]
    .join("\n");
    for operation in &operations {
        page += &operation.section(&types);
    }
    page + &types.section(&operations)
}

/// All operations, in the order of their paths.
fn operations(document: &Value) -> Vec<Operation<'_>> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, content) in item.as_object().unwrap() {
            operations.push(Operation { method: method.to_uppercase(), path, content });
        }
    }
    operations.sort_by_key(|operation| operation.path);
    operations
}

/// The answer that each operation may give instead of its own.
fn errors(operations: &[Operation<'_>], types: &Types<'_>) -> String {
    let answer = |operation: &Operation<'_>| operation.content["responses"]["default"].clone();
    let same = answer(&operations[0]);
    assert!(
        operations.iter().all(|operation| answer(operation) == same),
        "the paths have different errors: describe them at each path"
    );
    format!("## Errors\n\n{}\n{}", prose(&[&same["description"]]), types.answer(schema_of(&same)))
}

impl Operation<'_> {
    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    /// The scope of the token that it needs.
    fn scope(&self) -> String {
        let security = self.content["security"].as_array().into_iter().flatten();
        let scope = codes(security.filter_map(|one| one["token"][0].as_str()));
        if scope.is_empty() { "none".to_owned() } else { scope }
    }

    fn section(&self, types: &Types<'_>) -> String {
        let name = self.name();
        let about = prose(&[&self.content["summary"], &self.content["description"]]);
        let mut section = format!("\n## {name}\n\n{about}\nScope: {}.\n", self.scope());
        let parameters = self.content["parameters"].as_array().into_iter().flatten();
        let parameters: Vec<_> = parameters.map(|one| types.parameter(one)).collect();
        if !parameters.is_empty() {
            let heads = ["parameter", "in", "type", "required", "meaning"];
            section += &format!("\n{}", table(heads, parameters));
        }
        let body = schema_of(&self.content["requestBody"]);
        if !body.is_null() {
            section += &format!("\nBody, in JSON:\n\n{}", types.body(body));
        }
        for (status, answer) in self.answers() {
            let description = format!("Answer {status}: {}", text(&answer["description"]));
            section += &format!("\n{}\n", wrapped(&description));
            let schema = schema_of(answer);
            if !schema.is_null() {
                section += &format!("\n{}", types.answer(schema));
            }
        }
        section
    }

    /// Its own answers, by status.
    fn answers(&self) -> impl Iterator<Item = (&String, &Value)> {
        let answers = self.content["responses"].as_object().unwrap().iter();
        answers.filter(|(status, _)| *status != "default")
    }
}

/// The schema of a body.
fn schema_of(body: &Value) -> &Value {
    let contents = body["content"].as_object().into_iter().flatten();
    contents.map(|(_, content)| &content["schema"]).next().unwrap_or(&Value::Null)
}

impl Types<'_> {
    /// A schema without its name, and its name if it has one.
    fn resolved<'a>(&'a self, schema: &'a Value) -> (Option<&'a str>, &'a Value) {
        match schema["$ref"].as_str().and_then(|place| place.rsplit_once('/')) {
            Some((_, name)) => (Some(name), &self.0[name]),
            None => (None, schema),
        }
    }

    /// The type in a few words. A named type is a link.
    fn kind(&self, schema: &Value) -> String {
        if let (Some(name), _) = self.resolved(schema) {
            return link(name, name);
        }
        for (key, gap) in [("oneOf", " or "), ("anyOf", " or "), ("allOf", " with ")] {
            if let Some(parts) = schema[key].as_array() {
                return parts.iter().map(|part| self.kind(part)).collect::<Vec<_>>().join(gap);
            }
        }
        if let Some(words) = schema["enum"].as_array() {
            return codes(words.iter().filter_map(Value::as_str));
        }
        let kinds = match &schema["type"] {
            Value::Array(kinds) => kinds.iter().map(text).collect(),
            Value::Null => vec!["any JSON".to_owned()],
            kind => vec![text(kind)],
        };
        let kinds = kinds.iter().map(|kind| match kind.as_str() {
            "array" => format!("list of {}", self.kind(&schema["items"])),
            "object" => self.object(schema),
            "null" => "null".to_owned(),
            kind => match schema["format"].as_str() {
                Some(format) => format!("{kind} ({format})"),
                None => kind.to_owned(),
            },
        });
        kinds.collect::<Vec<_>>().join(" or ")
    }

    /// An object without a name in a few words: a map, the fields, or any object.
    fn object(&self, schema: &Value) -> String {
        if schema["additionalProperties"].is_object() {
            return format!("map to {}", self.kind(&schema["additionalProperties"]));
        }
        let fields = schema["properties"].as_object().into_iter().flatten();
        let fields: Vec<String> =
            fields.map(|(name, field)| format!("`{name}`: {}", self.kind(field))).collect();
        if fields.is_empty() { "object".to_owned() } else { fields.join(", ") }
    }

    fn parameter(&self, parameter: &Value) -> [String; 5] {
        [
            code(&text(&parameter["name"])),
            text(&parameter["in"]),
            self.kind(&parameter["schema"]),
            yes_or_no(parameter["required"] == true),
            described(parameter, &parameter["schema"]),
        ]
    }

    /// The fields of a request.
    fn body(&self, schema: &Value) -> String {
        let rows = self.fields(schema).into_iter().map(|(name, field)| {
            [code(name), field.kind, yes_or_no(field.required), field.meaning]
        });
        table(["field", "type", "required", "meaning"], rows)
    }

    /// The fields of an answer, or its type.
    fn answer(&self, schema: &Value) -> String {
        let fields = self.fields(schema);
        if fields.is_empty() {
            return format!("{}\n", wrapped(&self.kind(self.resolved(schema).1)));
        }
        let rows = fields.into_iter().map(|(name, field)| [code(name), field.kind, field.meaning]);
        table(["field", "type", "meaning"], rows)
    }

    /// The fields of a type, with those of the types that it contains whole.
    fn fields<'a>(&'a self, schema: &'a Value) -> BTreeMap<&'a str, Field> {
        let (_, schema) = self.resolved(schema);
        let parts = schema["allOf"].as_array().into_iter().flatten();
        let mut fields: BTreeMap<_, _> = parts.flat_map(|part| self.fields(part)).collect();
        let required = schema["required"].as_array();
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let required = required.is_some_and(|required| required.iter().any(|one| one == name));
            let meaning = described(field, field);
            fields.insert(name, Field { kind: self.kind(field), required, meaning });
        }
        fields
    }

    /// The types that fields of requests and answers have.
    fn section(&self, operations: &[Operation<'_>]) -> String {
        let mut used = BTreeSet::new();
        for operation in operations {
            self.add_used(&operation.content["parameters"], &mut used);
            self.add_used(schema_of(&operation.content["requestBody"]), &mut used);
            for (_, answer) in operation.answers() {
                self.add_used(self.resolved(schema_of(answer)).1, &mut used);
            }
        }
        let mut section = "\n## Types\n".to_owned();
        for name in used {
            let schema = &self.0[name];
            let about = prose(&[&schema["description"]]);
            section += &format!("\n### {name}\n\n{about}\n{}", self.answer(schema));
        }
        section
    }

    /// Adds the names in a schema, and those in the types that they name.
    fn add_used<'a>(&'a self, schema: &'a Value, used: &mut BTreeSet<&'a str>) {
        if let (Some(name), named) = self.resolved(schema)
            && used.insert(name)
        {
            self.add_used(named, used);
        }
        let (parts, fields) = (schema.as_array(), schema.as_object());
        for part in parts.into_iter().flatten().chain(fields.into_iter().flat_map(Map::values)) {
            self.add_used(part, used);
        }
    }
}

/// The description of a field, or that of its type.
fn described(field: &Value, schema: &Value) -> String {
    let parts = ["oneOf", "anyOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array());
    let parts = parts.flatten().map(|part| &part["description"]);
    let mut all = [&field["description"]].into_iter().chain(parts);
    all.find_map(Value::as_str).unwrap_or_default().to_owned()
}

fn yes_or_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Wrapped paragraphs.
fn prose(texts: &[&Value]) -> String {
    let texts = texts.iter().filter_map(|text| text.as_str());
    let paragraphs: String = texts.map(|text| format!("{}\n\n", wrapped(text))).collect();
    format!("{}\n", paragraphs.trim_end())
}
