//! Mistakes in the settings, and their places.

use std::fmt;
use std::path::PathBuf;

/// Where a setting was given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A line of the pipeline file, from 1; `None` for the whole file.
    File(PathBuf, Option<usize>),
    /// A variable of the environment.
    Variable(String),
    /// A `--set` flag, counted from 1.
    Flag(usize),
    /// The default of the key.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File(file, Some(line)) => write!(f, "{}:{line}", file.display()),
            Place::File(file, None) => write!(f, "{}", file.display()),
            Place::Variable(name) => f.write_str(name),
            Place::Flag(1) => f.write_str("--set"),
            Place::Flag(number) => write!(f, "--set (number {number})"),
            Place::Default => f.write_str("default"),
        }
    }
}

/// One mistake. Its text never contains the value, which may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    pub place: Place,
    /// The key, if there is one.
    pub key: Option<String>,
    /// The fault, and the allowed values.
    pub problem: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if let Some(key) = &self.key {
            write!(f, "{key} ")?;
        }
        f.write_str(&self.problem)
    }
}

/// All mistakes, one per line.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct Mistakes(Vec<Mistake>);

impl Mistakes {
    pub(super) fn add(&mut self, place: &Place, key: &str, problem: impl Into<String>) {
        self.0.push(Mistake {
            place: place.clone(),
            key: Some(key.to_owned()),
            problem: problem.into(),
        });
    }

    pub(super) fn add_without_key(&mut self, place: Place, problem: impl Into<String>) {
        self.0.push(Mistake { place, key: None, problem: problem.into() });
    }

    pub(super) fn sorted(mut self) -> Mistakes {
        self.0.sort();
        self.0.dedup();
        self
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The mistakes of the file by line, then those of variables, then those of flags.
    pub fn iter(&self) -> impl Iterator<Item = &Mistake> {
        self.0.iter()
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.0.iter().enumerate() {
            write!(f, "{}{mistake}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}
