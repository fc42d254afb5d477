//! Usage files for finance.
