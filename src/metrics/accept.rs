//! Chooses one of two exposition formats for a scraper.

use prometheus::PROTOBUF_FORMAT;

/// A format of Prometheus' exposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Length-delimited `io.prometheus.client.MetricFamily`: the only format with native histograms
    /// and created timestamps.
    Protobuf,
    /// Text 0.0.4: classic buckets only.
    Text,
}

impl Format {
    /// The format for an `Accept` header. Several headers are joined by commas; a missing one is
    /// empty.
    ///
    /// Protobuf if it is offered with both of its parameters, unless a supported text format has a
    /// higher weight. Wildcards always mean text: Prometheus 2.49.0 sends one with a higher weight
    /// than protobuf.
    #[must_use]
    pub fn for_accept(accept: &str) -> Self {
        let (mut protobuf, mut text) = (0.0, 0.0);
        for offer in accept.split(',').map(Offer::parse) {
            if offer.is_delimited_protobuf() {
                protobuf = offer.weight.max(protobuf);
            } else if offer.is_text() {
                text = offer.weight.max(text);
            }
        }
        if protobuf > 0.0 && protobuf >= text { Self::Protobuf } else { Self::Text }
    }

    /// The `Content-Type` of an answer. Without it, Prometheus 3 fails a scrape.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Protobuf => PROTOBUF_FORMAT,
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// One media type of an `Accept` header.
struct Offer<'a> {
    kind: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
    weight: f32,
}

impl<'a> Offer<'a> {
    fn parse(offer: &'a str) -> Self {
        let mut parts = offer.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let parameters: Vec<_> = parts
            .filter_map(|part| part.split_once('='))
            .map(|(name, value)| (name.trim_end(), value.trim_start().trim_matches('"')))
            .collect();
        let mut offer = Self { kind, parameters, weight: 1.0 };
        if let Some(weight) = offer.parameter("q") {
            // ignore an offer without a weight between 0 and 1
            offer.weight =
                weight.parse().ok().filter(|weight| (0.0..=1.0).contains(weight)).unwrap_or(0.0);
        }
        offer
    }

    fn parameter(&self, name: &str) -> Option<&'a str> {
        self.parameters
            .iter()
            .find(|(found, _)| found.eq_ignore_ascii_case(name))
            .map(|(_, value)| *value)
    }

    fn is_delimited_protobuf(&self) -> bool {
        self.kind.eq_ignore_ascii_case("application/vnd.google.protobuf")
            && self.parameter("proto") == Some("io.prometheus.client.MetricFamily")
            && self.parameter("encoding") == Some("delimited")
    }

    fn is_text(&self) -> bool {
        self.kind.eq_ignore_ascii_case("text/plain")
            && self.parameter("version").is_none_or(|version| version == "0.0.4")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTOBUF: &str = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";

    /// The rest of the header after protobuf, for each server version with native histograms
    /// enabled.
    const AFTER_PROTOBUF: [(&str, &str); 6] = [
        (
            "2.40",
            ",application/openmetrics-text;version=1.0.0;q=0.75,application/openmetrics-text;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        ),
        (
            "2.41 to 2.48",
            ",application/openmetrics-text;version=1.0.0;q=0.8,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        ),
        (
            "2.49.0",
            ";q=0.5,application/openmetrics-text;version=1.0.0;q=0.4,application/openmetrics-text;version=0.0.1;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=1",
        ),
        (
            "2.49.1 to 2.55",
            ";q=0.5,application/openmetrics-text;version=1.0.0;q=0.4,application/openmetrics-text;version=0.0.1;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        ),
        (
            "3.0 to 3.3",
            ";escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;escaping=allow-utf-8;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;escaping=allow-utf-8;q=0.2,*/*;q=0.1",
        ),
        (
            "3.4 and later",
            ";q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        ),
    ];

    #[test]
    fn every_server_gets_protobuf_when_it_asks_for_it_and_text_when_not() {
        for (server, rest) in AFTER_PROTOBUF {
            assert_eq!(
                Format::for_accept(&format!("{PROTOBUF}{rest}")),
                Format::Protobuf,
                "{server}"
            );
            let (_, without) = rest.split_once(',').unwrap();
            assert_eq!(
                Format::for_accept(without),
                Format::Text,
                "{server} without native histograms"
            );
        }
    }

    #[test]
    fn protobuf_is_only_what_carries_both_parameters_and_the_highest_weight() {
        let blanks = PROTOBUF.replace(';', "; ");
        for (accept, format) in [
            (PROTOBUF, Format::Protobuf),
            (&format!("{blanks},*/*;q=0.1"), Format::Protobuf),
            (&PROTOBUF.replace("application/vnd", "Application/VND"), Format::Protobuf),
            (&PROTOBUF.replace("=delimited", "=\"delimited\""), Format::Protobuf),
            (&format!("text/plain;version=1.0.0,{PROTOBUF};q=0.5"), Format::Protobuf),
            (&format!("text/plain;version=0.0.4;q=0.5,{PROTOBUF};q=0.5"), Format::Protobuf),
            (&format!("text/plain;version=0.0.4;q=0.6,{PROTOBUF};q=0.5"), Format::Text),
            (&format!("text/plain;q=0.6,{PROTOBUF};q=0.5"), Format::Text),
            (&format!("{PROTOBUF};q=0"), Format::Text),
            (&format!("{PROTOBUF};q=high"), Format::Text),
            (&format!("{PROTOBUF};q=NaN"), Format::Text),
            ("application/vnd.google.protobuf", Format::Text),
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text",
                Format::Text,
            ),
            ("application/vnd.google.protobuf;encoding=delimited", Format::Text),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Format::Text),
            ("*/*", Format::Text),
            ("", Format::Text),
            (";;,,=;q", Format::Text),
        ] {
            assert_eq!(Format::for_accept(accept), format, "{accept}");
        }
    }
}
