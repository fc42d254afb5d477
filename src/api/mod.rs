//! The HTTP side: metrics, health, entitlements and counts, all read from folds in memory.
