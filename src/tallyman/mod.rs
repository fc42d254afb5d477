//! Tallyman's wire form and client.
