//! Native histograms, shown through the prometheus crate.
