//! The effect of a correction on license counts, metrics and the vendor's bill.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::candidates::Candidate;
use crate::event::{Event, Fact, Payload};
use crate::ledger::{PublicationState, Source, corrections};
use crate::operations::effect::{Changing, WindowEffect, windows};
use crate::operations::{OperationError, Operations};
use crate::stages::{LicensesState, Stage as _};

/// Change of a family of metrics at the next rebuild.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FamilyChange {
    /// Name of the family.
    pub family: String,
    /// Counted or observed events that a rebuild removes.
    pub removed: u64,
    /// Counted or observed events that a rebuild adds.
    pub added: u64,
}

/// A corrected event that the vendor has or may have billed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VendorNote {
    /// coderd's id of the usage event.
    pub event_id: String,
    /// State of the publication.
    pub state: PublicationState,
    /// Whether the vendor has accepted the event. Otherwise it may have.
    pub billed: bool,
    /// Tallyman's name of the billed usage type.
    pub event_type: String,
    /// Billed quantity in the type's unit, in decimal.
    pub quantity_billed: String,
    /// Usage type by coderd's row; absent: coderd does not have the event.
    pub true_event_type: Option<String>,
    /// Quantity by coderd's row, in decimal.
    pub quantity_true: Option<String>,
}

/// The effect of a correction.
pub(super) struct CorrectionEffect {
    pub licenses: Vec<WindowEffect>,
    pub metrics: Vec<FamilyChange>,
    pub vendor: Vec<VendorNote>,
}

impl Operations {
    pub(super) async fn correction_effect(
        &self,
        source: &Source,
        candidates: &[Candidate],
    ) -> Result<CorrectionEffect, OperationError> {
        let mut licenses = Changing::<LicensesState>::begin(&self.ledger).await?;
        for candidate in candidates {
            let (before, after) = (&candidate.new.before, &candidate.new.after);
            let boxed = |event: &Option<Event>| event.clone().map(Box::new);
            licenses
                .after
                .apply(&Fact::Corrected {
                    deployment: source.deployment_id,
                    before: boxed(before),
                    after: boxed(after),
                })
                .map_err(anyhow::Error::from)?;
        }
        let mut licenses = windows(&licenses);
        licenses.retain(|window| window.before != window.after);
        Ok(CorrectionEffect {
            licenses,
            metrics: self.metric_changes(source, candidates).await?,
            vendor: self.vendor_notes(source, candidates).await?,
        })
    }

    /// The corrected usage that the vendor has or may have billed.
    async fn vendor_notes(
        &self,
        source: &Source,
        candidates: &[Candidate],
    ) -> Result<Vec<VendorNote>, OperationError> {
        let ids: Vec<String> = candidates.iter().map(|one| one.new.event_id.clone()).collect();
        let billed =
            self.ledger.run(async |conn| corrections::billed(conn, source.id, &ids).await).await?;
        let note = |candidate: &Candidate| {
            let new = &candidate.new;
            let now = new.publication?;
            let may_be_billed = match now.state {
                PublicationState::Published | PublicationState::Unknown => true,
                PublicationState::Pending => now.unanswered,
                _ => false,
            };
            let sent = billed.get(&new.event_id).cloned().or_else(|| amount(new.before.as_ref()));
            let (event_type, quantity_billed) = sent.filter(|_| may_be_billed)?;
            let (true_event_type, quantity_true) = amount(new.after.as_ref()).unzip();
            Some(VendorNote {
                event_id: new.event_id.clone(),
                state: now.state,
                billed: now.state == PublicationState::Published,
                event_type,
                quantity_billed,
                true_event_type,
                quantity_true,
            })
        };
        Ok(candidates.iter().filter_map(note).collect())
    }
}

/// Type and quantity of usage.
fn amount(event: Option<&Event>) -> Option<(String, String)> {
    match &event?.payload {
        Payload::Usage(usage) => Some((
            usage.quantity.usage_type().as_str().to_owned(),
            usage.quantity.number().to_string(),
        )),
        Payload::Build(_) | Payload::Claim(_) => None,
    }
}
