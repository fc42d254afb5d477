//! Usage to Tallyman, through the publication queue only.
