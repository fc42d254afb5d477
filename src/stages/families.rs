//! The metric families of stage `metrics`.

use crate::metrics::{BucketOptions, CounterFamily, HistogramFamily, NativeOptions};

/// Regular creations of all time. Source: coderd's query for the metric of this name (first
/// successful start build of a workspace, not by the prebuilds user). Labels keep the names of the
/// first collection.
pub const CREATIONS: CounterFamily<3> = CounterFamily {
    name: "coderd_workspace_creation_total",
    help: "Total regular (non-prebuilt) workspace creations of all time by organization, template, and preset: each workspace's first successful start, unless the prebuilds user started it.",
    labels: ["organization_name", "template_name", "preset_name"],
};

/// Durations of successful creations since the introduction; `type` is `regular` or `prebuild`.
pub const CREATION_SECONDS: HistogramFamily<4> = HistogramFamily {
    name: "coderd_workspace_creation_duration_seconds",
    help: "Time to create a workspace by organization, template, preset, and type (regular or prebuild), of successful builds completed since the introduction.",
    labels: ["organization_name", "template_name", "preset_name", "type"],
    buckets: BucketOptions::new(
        &[1.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0],
        Some(NativeOptions::NEVER_RESET),
    ),
};

/// Durations of successful claims since the introduction.
pub const CLAIM_SECONDS: HistogramFamily<3> = HistogramFamily {
    name: "coderd_prebuilt_workspace_claim_duration_seconds",
    help: "Time to claim a prebuilt workspace by organization, template, and preset, of successful claims completed since the introduction.",
    labels: ["organization_name", "template_name", "preset_name"],
    buckets: BucketOptions::new(
        &[1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0],
        Some(NativeOptions::NEVER_RESET),
    ),
};

/// Observations whose start is after their end because two clocks differ. They are observed as 0.
/// Counted by organization, because each provisioner belongs to one.
pub const NEGATIVE_DURATIONS: CounterFamily<1> = CounterFamily {
    name: "tallyline_negative_durations_total",
    help: "Creations and claims whose start is after their end, observed as 0, because the clocks of coderd's replicas or provisioners differ.",
    labels: ["organization_name"],
};
