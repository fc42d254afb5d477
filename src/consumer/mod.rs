//! From the log into the ledger: one record, one transaction.
