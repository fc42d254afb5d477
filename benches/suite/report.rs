//! Lines of the table: a value, its limit in the same run, their ratio and the goal.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;
use sqlx::{Connection as _, PgConnection};

/// One line of the table.
#[derive(Debug, Serialize)]
pub struct Line {
    pub row: String,
    pub value: f64,
    pub unit: &'static str,
    /// The limit in the same unit, and its name. None: the value is compared with the goal.
    pub limit: Option<(f64, &'static str)>,
    pub ratio: Option<f64>,
    pub goal: Goal,
    pub met: bool,
    /// Facts that explain the value.
    pub note: String,
}

/// The condition of a line: on its ratio if it has a limit, else on its value.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Line {
    /// A value without a limit.
    pub fn value(row: impl Into<String>, value: f64, unit: &'static str, goal: Goal) -> Line {
        Line {
            row: row.into(),
            value,
            unit,
            limit: None,
            ratio: None,
            met: goal.is_met(value),
            goal,
            note: String::new(),
        }
    }

    /// A value against its limit.
    pub fn ratio(
        row: impl Into<String>,
        value: f64,
        unit: &'static str,
        limit: (f64, &'static str),
        goal: Goal,
    ) -> Line {
        let ratio = value / limit.0;
        Line {
            limit: Some(limit),
            ratio: Some(ratio),
            met: goal.is_met(ratio),
            ..Line::value(row, value, unit, goal)
        }
    }

    #[must_use]
    pub fn with(mut self, note: impl Into<String>) -> Line {
        self.note = note.into();
        self
    }
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Goal::AtLeast(least) => value >= least,
            Goal::AtMost(most) => value <= most,
        }
    }

    fn text(self) -> String {
        match self {
            Goal::AtLeast(least) => format!(">= {}", number(least)),
            Goal::AtMost(most) => format!("<= {}", number(most)),
        }
    }
}

/// Everything that a run has measured.
#[derive(Serialize)]
pub struct Report {
    pub surroundings: Surroundings,
    pub lines: Vec<Line>,
    /// Rows that could not be measured, and why.
    pub failures: Vec<(String, String)>,
}

/// The machine and the servers of the figures.
#[derive(Serialize)]
pub struct Surroundings {
    pub postgres: String,
    pub cpus: usize,
    /// The last minute's load average at the start.
    pub load: String,
    pub quick: bool,
}

impl Surroundings {
    pub async fn read(server: &str, quick: bool) -> Result<Surroundings> {
        let mut connection = PgConnection::connect(server).await?;
        let postgres = sqlx::query_scalar("select version()").fetch_one(&mut connection).await?;
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Surroundings { postgres, cpus, load: load(), quick })
    }
}

impl Report {
    /// The table as printed.
    pub fn table(&self) -> String {
        let Surroundings { postgres, cpus, load, quick } = &self.surroundings;
        let mut text = format!("{postgres}\n{cpus} CPUs, load average {load} at the start");
        text.push_str(if *quick { ", small sizes: not figures to publish\n\n" } else { "\n\n" });
        let head = ["ROW", "VALUE", "UNIT", "LIMIT", "RATIO", "GOAL", "MET"];
        let cells = self.lines.iter().map(|line| {
            [
                line.row.clone(),
                number(line.value),
                line.unit.to_owned(),
                line.limit
                    .map_or(String::new(), |(limit, what)| format!("{} ({what})", number(limit))),
                line.ratio.map_or(String::new(), number),
                line.goal.text(),
                if line.met { "yes" } else { "no" }.to_owned(),
            ]
        });
        let rows: Vec<[String; 7]> =
            std::iter::once(head.map(str::to_owned)).chain(cells).collect();
        let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..7).map(width).collect();
        for row in &rows {
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(text, "{cell:<width$}  ");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        for (row, why) in &self.failures {
            let _ = writeln!(text, "{row}: not measured: {why}");
        }
        text
    }

    /// Writes the report as JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }
}

/// Prints a line as soon as it is known, with its note.
pub fn announce(line: &Line) {
    let of = line.limit.map_or(String::new(), |(limit, what)| {
        format!(
            " of {} ({what}), ratio {}",
            number(limit),
            line.ratio.map_or(String::new(), number)
        )
    });
    let Line { row, value, unit, note, .. } = line;
    eprintln!("{row}: {} {unit}{of}; load {}; {note}", number(*value), load());
}

/// The last minute's load average. It includes this program and its servers.
pub fn load() -> String {
    let averages = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    averages.split_whitespace().next().unwrap_or("unknown").to_owned()
}

fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The middle of the values; the mean of the two middle ones.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value at this share of the ordered values. Between two values it is interpolated.
pub fn quantile(values: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    let at = share * last as f64;
    let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
    below + (above - below) * at.fract()
}
