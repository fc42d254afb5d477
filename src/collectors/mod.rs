//! From a source to the log: completed builds, claims, usage; licenses go to the ledger.
