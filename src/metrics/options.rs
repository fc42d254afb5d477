//! The constants of a histogram family. They are no part of any state: a family whose constants change is folded again.

use super::index;

/// 2^-128: what the Go client takes where no threshold is set. Above 0, so that every server knows an empty native histogram as one.
pub const DEFAULT_ZERO_THRESHOLD: f64 = f64::from_bits((1023 - 128) << 52);

/// Which buckets a histogram has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketOptions {
    classic_bounds: &'static [f64],
    native: Option<NativeOptions>,
}

impl BucketOptions {
    /// Classic buckets with these upper bounds (seconds; ascending, finite, without `+Inf`, which is added when shown), and native
    /// buckets beside them where `native` is given.
    ///
    /// # Panics
    /// Where the bounds do not ascend or are not finite; for a constant, that is an error of compilation.
    #[must_use]
    pub const fn new(classic_bounds: &'static [f64], native: Option<NativeOptions>) -> Self {
        let mut i = 0;
        while i < classic_bounds.len() {
            assert!(classic_bounds[i].is_finite(), "classic bounds are finite");
            assert!(i == 0 || classic_bounds[i - 1] < classic_bounds[i], "classic bounds ascend");
            i += 1;
        }
        Self { classic_bounds, native }
    }

    /// The upper bounds of the classic buckets, ascending.
    #[must_use]
    pub const fn classic_bounds(&self) -> &'static [f64] {
        self.classic_bounds
    }

    /// The native buckets' constants.
    #[must_use]
    pub const fn native(&self) -> Option<&NativeOptions> {
        self.native.as_ref()
    }
}

/// How fine native buckets are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NativeOptions {
    /// A bucket spans at most this factor; above 1.
    pub factor: f64,
    /// The zero bucket holds values up to this.
    pub zero_threshold: f64,
    /// The most populated buckets, the zero bucket not counted; above it the resolution is halved. 0 is no limit.
    pub max_buckets: usize,
}

impl NativeOptions {
    /// coderd's settings, without its reset: a fold's series never fall.
    pub const NEVER_RESET: Self = Self { factor: 1.1, zero_threshold: DEFAULT_ZERO_THRESHOLD, max_buckets: 100 };

    /// The schema that a histogram starts with.
    #[must_use]
    pub fn initial_schema(&self) -> i8 {
        index::schema_for_factor(self.factor)
    }
}
