//! Grafana's changes of a dashboard's queries before they reach Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// A shipped dashboard.
pub struct Dashboard(pub Value);

/// One query of a panel.
pub struct Target {
    pub panel: String,
    pub kind: String,
    /// `A`, `B`, …
    pub reference: String,
    pub expr: String,
    /// One evaluation at the end of the time range, instead of one at each step.
    pub instant: bool,
    /// The variable that repeats the panel.
    pub repeat: Option<String>,
}

/// The choice of a variable.
#[derive(Clone, Debug)]
pub enum Chosen {
    /// All, if the variable has an `allValue`.
    All,
    /// Some of several.
    Some(Vec<&'static str>),
    /// The value of a single-value variable, or the one for which a panel is repeated.
    One(String),
}

impl Dashboard {
    pub fn shipped(name: &str) -> Dashboard {
        let path = format!("{}/dashboards/grafana/{name}", env!("CARGO_MANIFEST_DIR"));
        Dashboard(
            serde_json::from_str(&std::fs::read_to_string(path).expect("read the dashboard"))
                .expect("JSON"),
        )
    }

    /// All panels, including those in rows.
    pub fn panels(&self) -> Vec<&Value> {
        fn and_inside(panel: &Value) -> impl Iterator<Item = &Value> {
            std::iter::once(panel).chain(list(&panel["panels"]))
        }
        list(&self.0["panels"]).flat_map(and_inside).collect()
    }

    pub fn variables(&self) -> BTreeMap<&str, &Value> {
        list(&self.0["templating"]["list"])
            .map(|variable| (text(&variable["name"]), variable))
            .collect()
    }

    pub fn targets(&self) -> Vec<Target> {
        let of = |panel: &Value| {
            let one = |target: &Value| Target {
                panel: text(&panel["title"]).to_owned(),
                kind: text(&panel["type"]).to_owned(),
                reference: text(&target["refId"]).to_owned(),
                expr: text(&target["expr"]).to_owned(),
                instant: target["instant"] == true,
                repeat: panel["repeat"].as_str().map(str::to_owned),
            };
            list(&panel["targets"]).map(one).collect::<Vec<_>>()
        };
        self.panels().into_iter().flat_map(of).collect()
    }

    /// The query of the panel with that title, by reference.
    pub fn expr(&self, panel: &str, reference: &str) -> String {
        let target = self
            .targets()
            .into_iter()
            .find(|target| target.panel == panel && target.reference == reference);
        target.unwrap_or_else(|| panic!("no query {reference} in a panel {panel:?}")).expr
    }

    /// The values that a custom variable offers.
    pub fn offered(&self, variable: &str) -> Vec<String> {
        list(&self.variables()[variable]["options"])
            .map(|option| text(&option["value"]).to_owned())
            .collect()
    }

    /// The expression as Prometheus gets it. Built-in variables have the values for ten minutes in
    /// steps of a second, with a scrape interval of 15 s.
    ///
    /// # Panics
    /// At an undefined variable, or at a choice that does not fit it.
    pub fn interpolated(&self, expr: &str, chosen: &BTreeMap<&str, Chosen>) -> String {
        let variables = self.variables();
        let mut text = expr.to_owned();
        // A variable's value may name another variable.
        for _ in 0..2 {
            text = replaced(&text, |name, format| match name {
                "__range" => "600s".to_owned(),
                "__interval" => "1s".to_owned(),
                "__rate_interval" => "1m0s".to_owned(),
                name => {
                    let variable = variables
                        .get(name)
                        .unwrap_or_else(|| panic!("{name} is not defined: {expr}"));
                    value(
                        variable,
                        chosen.get(name).unwrap_or_else(|| panic!("nothing is chosen in {name}")),
                        format,
                    )
                }
            });
        }
        text
    }
}

/// Names of variables in a text, including built-in ones.
pub fn used(text: &str) -> BTreeSet<String> {
    let names = std::cell::RefCell::new(BTreeSet::new());
    replaced(text, |name, _| {
        names.borrow_mut().insert(name.to_owned());
        String::new()
    });
    names.into_inner()
}

/// Replaces each `$name`, `${name}` and `${name:format}`.
fn replaced(text: &str, by: impl Fn(&str, Option<&str>) -> String) -> String {
    let mut parts = text.split('$');
    let mut replaced = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, format, rest) = if let Some(braced) = part.strip_prefix('{') {
            let (inside, rest) =
                braced.split_once('}').unwrap_or_else(|| panic!("a brace is open: {text}"));
            let (name, format) = inside
                .split_once(':')
                .map_or((inside, None), |(name, format)| (name, Some(format)));
            (name, format, rest)
        } else {
            let end =
                part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
            (&part[..end], None, &part[end..])
        };
        assert!(!name.is_empty(), "a dollar without a name: {text}");
        replaced += &by(name, format);
        replaced += rest;
    }
    replaced
}

/// The Prometheus data source's form of a choice. A variable with several values is a regular
/// expression in a string, unless its raw value is requested.
fn value(variable: &Value, chosen: &Chosen, format: Option<&str>) -> String {
    let several = variable["multi"] == true || variable["includeAll"] == true;
    match (chosen, format) {
        (Chosen::One(one), Some("raw")) => one.clone(),
        (_, Some(format)) => panic!("format {format} of {chosen:?}"),
        (Chosen::One(one), None) if several => escaped(one),
        (Chosen::One(one), None) => one.clone(),
        (Chosen::All, None) => text(&variable["allValue"]).to_owned(),
        (Chosen::Some(values), None) => {
            assert!(several, "several values of {variable}");
            match &values[..] {
                [one] => escaped(one),
                values => format!(
                    "({})",
                    values.iter().map(|value| escaped(value)).collect::<Vec<_>>().join("|")
                ),
            }
        }
    }
}

fn escaped(value: &str) -> String {
    let mut escaped = String::new();
    for c in value.chars() {
        match c {
            '\\' => escaped += r"\\\\",
            '$' | '^' | '*' | '{' | '}' | '[' | ']' | '+' | '?' | '.' | '(' | ')' | '|' => {
                escaped.extend(['\\', '\\', c])
            }
            c => escaped.push(c),
        }
    }
    escaped
}

pub fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
