//! The query of a request, read strictly: a misspelt name must not be passed over.

use axum::extract::Query;
use axum::http::Uri;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::answer::Problem;

/// Names and values, each name at most once.
#[derive(Debug)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// The query, where all its names are among `allowed`.
    pub(super) fn of(uri: &Uri, allowed: &[&str]) -> Result<Self, Problem> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|error| Problem::parameter(uri.query().unwrap_or_default(), error.to_string()))?;
        for (at, (name, _)) in pairs.iter().enumerate() {
            if !allowed.contains(&name.as_str()) {
                return Err(Problem::parameter(name, format!("unknown parameter; known are {}", allowed.join(", "))));
            }
            if pairs[..at].iter().any(|(before, _)| before == name) {
                return Err(Problem::parameter(name, "given more than once"));
            }
        }
        Ok(Self(pairs))
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// An instant that must be there.
    pub(super) fn time(&self, name: &str) -> Result<DateTime<Utc>, Problem> {
        let text = self.text(name).ok_or_else(|| Problem::parameter(name, "is needed, an instant such as 2025-07-01T00:00:00Z"))?;
        match DateTime::parse_from_rfc3339(text) {
            Ok(time) => Ok(time.to_utc()),
            // An offset's plus sign that was not escaped arrives as a blank.
            Err(_) if text.contains(' ') => Err(Problem::parameter(name, "is no instant: write an offset's + as %2B, or use Z")),
            Err(error) => Err(Problem::parameter(name, format!("is no instant such as 2025-07-01T00:00:00Z: {error}"))),
        }
    }

    /// The deployment asked for, if one is.
    pub(super) fn source(&self) -> Result<Option<Uuid>, Problem> {
        let source = self.text("source").map(Uuid::parse_str).transpose();
        source.map_err(|error| Problem::parameter("source", format!("is no deployment id: {error}")))
    }

    /// Whether a parameter with a single possible value is there.
    pub(super) fn is(&self, name: &str, value: &str) -> Result<bool, Problem> {
        match self.text(name) {
            None => Ok(false),
            Some(text) if text == value => Ok(true),
            Some(_) => Err(Problem::parameter(name, format!("can only be {value}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: [&str; 4] = ["start", "end", "source", "days"];

    fn read(query: &str) -> Result<Parameters, Problem> {
        Parameters::of(&format!("/path?{query}").parse().unwrap(), &ALLOWED)
    }

    fn field<T: std::fmt::Debug>(result: Result<T, Problem>) -> String {
        result.unwrap_err().field.expect("a field")
    }

    #[test]
    fn what_is_given_is_had() {
        let parameters = read("start=2025-07-01T02:00:00.000001%2B02:00&source=00000000-0000-0000-0000-0000000000d1&days=whole").unwrap();
        assert_eq!(parameters.time("start").unwrap(), "2025-07-01T00:00:00.000001Z".parse::<DateTime<Utc>>().unwrap());
        assert_eq!(parameters.source().unwrap(), Some(Uuid::from_u128(0xd1)));
        assert!(parameters.is("days", "whole").unwrap());
        assert!(!read("").unwrap().is("days", "whole").unwrap());
        assert_eq!(read("").unwrap().source().unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(field(read("strat=x")), "strat");
        assert_eq!(field(read("start=x&start=y")), "start");
        assert_eq!(field(read("").unwrap().time("end")), "end");
        assert_eq!(field(read("days=half").unwrap().is("days", "whole")), "days");
        assert_eq!(field(read("source=x").unwrap().source()), "source");
        for wrong in ["", "2025-07-01", "1751328000", "2025-02-30T00:00:00Z", "2025-07-01T00:00:00"] {
            assert_eq!(field(read(&format!("start={wrong}")).unwrap().time("start")), "start", "{wrong}");
        }
        let unescaped = read("start=2025-07-01T00:00:00+02:00").unwrap().time("start").unwrap_err();
        assert!(unescaped.message.contains("%2B"), "{unescaped:?}");
    }
}
