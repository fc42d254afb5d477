//! The index and the end of a value's bucket, exact: by comparison with the shared table of bounds,
//! never by a logarithm.
//!
//! In schema n, -4 to 8, bucket i (any integer) holds (b^(i-1), b^i] with b = 2^(2^-n). 1 is a
//! bound in every schema (the end of bucket 0).

use super::bounds::SCHEMA_8_BOUNDS;

/// The coarsest schema: a bucket spans a factor of 65,536.
pub const MIN_SCHEMA: i8 = -4;
/// The finest schema: a bucket spans a factor of 1.0027.
pub const MAX_SCHEMA: i8 = 8;

const MANTISSA_BITS: u32 = 52;
const EXPONENT_BIAS: i32 = 1023;

/// The coarsest schema whose buckets grow by at most `factor`, which is above 1. A factor of 1.1
/// gives 3.
#[must_use]
pub fn schema_for_factor(factor: f64) -> i8 {
    // the clamp limits it to -4 to 8, so the cast loses nothing
    (-factor.log2().log2().floor()).clamp(MIN_SCHEMA.into(), MAX_SCHEMA.into()) as i8
}

/// The bucket of `value`, which is above 0. Infinity is one bucket beyond the largest finite value.
#[must_use]
pub fn bucket_index(value: f64, schema: i8) -> i32 {
    let finest =
        if value == f64::INFINITY { finest_index(f64::MAX) + 1 } else { finest_index(value) };
    coarser(finest, u32::from(MAX_SCHEMA.abs_diff(schema)))
}

/// The bucket that contains bucket `index` after `times` halvings: `index / 2^times`, rounded up.
pub(super) fn coarser(index: i32, times: u32) -> i32 {
    -(-index >> times)
}

/// The index in the finest schema. A coarser bucket is a union of whole finer ones, so this look-up
/// serves all schemas.
fn finest_index(value: f64) -> i32 {
    let (fraction, exponent) = fraction_and_exponent(value);
    let bounds_below = SCHEMA_8_BOUNDS.partition_point(|bound| *bound < fraction);
    // At most 256, so the cast loses nothing. A fraction of 0.5 is the power of two below the
    // exponent.
    (exponent - 1) * 256 + bounds_below as i32
}

/// `value` as fraction times a power of two, with the fraction in [0.5, 1).
fn fraction_and_exponent(value: f64) -> (f64, i32) {
    let subnormal = value < f64::MIN_POSITIVE;
    let normal = if subnormal { value * power_of_two(54) } else { value };
    let bits = normal.to_bits();
    let biased = (bits >> MANTISSA_BITS) as i32;
    let fraction = f64::from_bits((bits & ((1 << MANTISSA_BITS) - 1)) | 0.5_f64.to_bits());
    (fraction, biased - (EXPONENT_BIAS - 1) - if subnormal { 54 } else { 0 })
}

/// The inclusive upper bound of bucket `index` of positive values. The bucket of the largest finite
/// value ends at that value, and the next one at infinity.
#[cfg(test)]
pub(super) fn upper_bound(index: i32, schema: i8) -> f64 {
    let finest = i64::from(index) << MAX_SCHEMA.abs_diff(schema);
    let (power, step) = (finest.div_euclid(256), finest.rem_euclid(256) as usize);
    match power {
        1024 if step == 0 => f64::MAX,
        1024.. => f64::INFINITY,
        ..-1080 => 0.0,
        // rounded at most once, in the last product, if the bound is subnormal
        -1080..-1000 => {
            2.0 * SCHEMA_8_BOUNDS[step] * power_of_two(power as i32 + 100) * power_of_two(-100)
        }
        _ => 2.0 * SCHEMA_8_BOUNDS[step] * power_of_two(power as i32),
    }
}

/// 2^exponent for -1022 to 1023.
const fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + EXPONENT_BIAS) as u64) << MANTISSA_BITS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: the smallest index whose bound is not below the value.
    fn index_by_search(value: f64, schema: i8) -> i32 {
        let (mut low, mut high) = (-400_000, 400_000);
        while low < high {
            let middle = (low + high) >> 1;
            if upper_bound(middle, schema) >= value { high = middle } else { low = middle + 1 }
        }
        low
    }

    /// Buckets that end at a normal number: from 2^-1022 to below 2^1024.
    fn normal_buckets() -> impl Strategy<Value = (i32, i8)> {
        (MIN_SCHEMA..=MAX_SCHEMA).prop_flat_map(|schema| {
            let per_power_of_two = f64::from(schema).exp2();
            let (first, beyond) =
                ((-1022.0 * per_power_of_two).ceil() as i32, (1024.0 * per_power_of_two) as i32);
            (first..beyond, Just(schema))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn the_index_of_any_value_agrees_with_the_bounds(
            // bounds among subnormal numbers collapse, so the search is less exact than the
            // definition there
            bits in f64::MIN_POSITIVE.to_bits()..f64::INFINITY.to_bits(),
            schema in MIN_SCHEMA..=MAX_SCHEMA,
        ) {
            let value = f64::from_bits(bits);
            prop_assert_eq!(bucket_index(value, schema), index_by_search(value, schema));
        }

        #[test]
        fn the_index_of_a_usual_duration_agrees_with_the_bounds(micros in 1_i64..10_000_000_000, schema in MIN_SCHEMA..=MAX_SCHEMA) {
            let value = micros as f64 / 1e6;
            prop_assert_eq!(bucket_index(value, schema), index_by_search(value, schema));
        }

        #[test]
        fn a_bound_belongs_to_its_bucket_and_the_next_number_to_the_next((index, schema) in normal_buckets()) {
            let bound = upper_bound(index, schema);
            prop_assert_eq!(bucket_index(bound, schema), index);
            prop_assert_eq!(bucket_index(bound.next_up(), schema), index + 1);
        }
    }

    #[test]
    fn every_subnormal_power_of_two_is_a_bound() {
        for power in -1074..-1022 {
            let value = f64::from_bits(1 << (power + 1074));
            for schema in 0..=MAX_SCHEMA {
                assert_eq!(bucket_index(value, schema), power << schema);
                assert_eq!(upper_bound(power << schema, schema), value);
            }
        }
    }

    #[test]
    fn the_ends_of_the_number_range_have_their_buckets() {
        for schema in MIN_SCHEMA..=MAX_SCHEMA {
            let last = bucket_index(f64::MAX, schema);
            assert_eq!(upper_bound(last, schema), f64::MAX);
            assert_eq!(bucket_index(f64::INFINITY, schema), last + 1);
            assert_eq!(upper_bound(last + 1, schema), f64::INFINITY);
            // the smallest subnormal is 2^-1074
            let least = (-1074.0 * f64::from(schema).exp2()).ceil() as i32;
            assert_eq!(bucket_index(5e-324, schema), least);
        }
    }
}
