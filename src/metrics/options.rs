//! The constants of a histogram family. They are not part of a state: after a change of constants,
//! the family must be folded again.

use super::index;

/// 2^-128, the Go client's default threshold. It is above 0, so that every server recognizes an
/// empty native histogram.
pub const DEFAULT_ZERO_THRESHOLD: f64 = f64::from_bits((1023 - 128) << 52);

/// The buckets of a histogram.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketOptions {
    classic_bounds: &'static [f64],
    native: Option<NativeOptions>,
}

impl BucketOptions {
    /// Classic buckets with these upper bounds (seconds; ascending, finite, without `+Inf`, which
    /// the exposition adds). Also native buckets if `native` is given.
    ///
    /// # Panics
    /// If the bounds do not ascend or are not finite. For a constant, this is a compile error.
    #[must_use]
    pub const fn new(classic_bounds: &'static [f64], native: Option<NativeOptions>) -> Self {
        let mut i = 0;
        while i < classic_bounds.len() {
            assert!(classic_bounds[i].is_finite(), "classic bounds must be finite");
            assert!(
                i == 0 || classic_bounds[i - 1] < classic_bounds[i],
                "classic bounds must ascend"
            );
            i += 1;
        }
        Self { classic_bounds, native }
    }

    /// The upper bounds of the classic buckets, ascending.
    #[must_use]
    pub const fn classic_bounds(&self) -> &'static [f64] {
        self.classic_bounds
    }

    #[must_use]
    pub const fn native(&self) -> Option<&NativeOptions> {
        self.native.as_ref()
    }
}

/// The resolution of native buckets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NativeOptions {
    /// Maximum factor that a bucket spans; above 1.
    pub factor: f64,
    /// Largest value in the zero bucket.
    pub zero_threshold: f64,
    /// Maximum populated buckets without the zero bucket. Above it the resolution is halved. 0
    /// means unlimited.
    pub max_buckets: usize,
}

impl NativeOptions {
    /// coderd's settings without its reset, because a fold's series never decrease.
    pub const NEVER_RESET: Self =
        Self { factor: 1.1, zero_threshold: DEFAULT_ZERO_THRESHOLD, max_buckets: 100 };

    /// The initial schema of a histogram.
    #[must_use]
    pub fn initial_schema(&self) -> i8 {
        index::schema_for_factor(self.factor)
    }
}
