//! What a collector counts of itself.

use prometheus::{IntCounterVec, Opts, Registry};

use crate::event::Topic;

/// Counters of this process's collector. Names begin with `tallyline_collector_`.
#[derive(Clone, Debug)]
pub struct CollectorTelemetry {
    too_large: IntCounterVec,
}

impl Default for CollectorTelemetry {
    /// Counters that nothing shows.
    fn default() -> Self {
        let too_large = Opts::new(
            "tallyline_collector_refused_by_size_total",
            "Appends that the brokers refused by the size of their records: max.message.bytes of the topic is too small.",
        );
        let too_large = IntCounterVec::new(too_large, &["topic"]).expect("valid names");
        for topic in Topic::ALL {
            too_large.with_label_values(&[topic.name()]);
        }
        CollectorTelemetry { too_large }
    }
}

impl CollectorTelemetry {
    /// Registers all in `registry`.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let telemetry = CollectorTelemetry::default();
        registry.register(Box::new(telemetry.too_large.clone()))?;
        Ok(telemetry)
    }

    pub(super) fn too_large(&self, topic: Topic) {
        self.too_large.with_label_values(&[topic.name()]).inc();
    }
}
