//! A collector's own metrics.

use chrono::TimeDelta;
use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

use crate::event::Topic;

/// One and five minutes, one and six hours, a day, a week, 31 days.
const BUCKETS: [f64; 7] = [60.0, 300.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0, 2_678_400.0];

/// Values of the label `kind`.
pub(super) const LATE_BUILD: &str = "build";
pub(super) const LATE_USAGE: &str = "usage";

/// Metrics of this process's collector; clones share them. Names begin with `tallyline_collector_`.
#[derive(Clone, Debug)]
pub struct CollectorTelemetry {
    too_large: IntCounterVec,
    late: HistogramVec,
}

impl Default for CollectorTelemetry {
    /// Metrics that are not registered.
    fn default() -> Self {
        let too_large = Opts::new(
            "tallyline_collector_refused_by_size_total",
            "Appends that the brokers refused because a record was too large: max.message.bytes of the topic is too small.",
        );
        let too_large = IntCounterVec::new(too_large, &["topic"]).expect("valid names");
        for topic in Topic::ALL {
            too_large.with_label_values(&[topic.name()]);
        }
        let late = HistogramOpts::new(
            "tallyline_collector_late_seconds",
            "Age of builds and usage that were found after a pass had reported their time complete. Runtime is excluded: it is dated by its hour.",
        );
        let late =
            HistogramVec::new(late.buckets(BUCKETS.to_vec()), &["kind"]).expect("valid names");
        for kind in [LATE_BUILD, LATE_USAGE] {
            late.with_label_values(&[kind]);
        }
        CollectorTelemetry { too_large, late }
    }
}

impl CollectorTelemetry {
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let telemetry = CollectorTelemetry::default();
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        Ok(telemetry)
    }

    /// Each metric, for its registration and for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![Box::new(self.too_large.clone()), Box::new(self.late.clone())]
    }

    pub(super) fn too_large(&self, topic: Topic) {
        self.too_large.with_label_values(&[topic.name()]).inc();
    }

    pub(super) fn late(&self, kind: &str, age: TimeDelta) {
        self.late.with_label_values(&[kind]).observe(age.as_seconds_f64());
    }
}
