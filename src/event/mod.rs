//! The one event type that crosses the log, its wire form and its digest.
