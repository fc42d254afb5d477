//! `tallyline coderd-sim` and `tallyline tallyman-sim`

use super::{Context, Exit, Failure};
use crate::sim;

pub(super) async fn coderd(options: sim::coderd::Options, context: Context) -> Result<Exit, Failure> {
    sim::coderd::run(options, context.clock, context.stop).await?;
    Ok(Exit::Success)
}

pub(super) async fn tallyman(options: sim::tallyman::Options, context: Context) -> Result<Exit, Failure> {
    sim::tallyman::run(options, context.clock, context.stop).await?;
    Ok(Exit::Success)
}
