//! Reasons to show no domain series.

use super::chosen_source::NoSource;

/// Why an answer has no domain series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Withheld {
    /// Another process shows them, or none does yet.
    NotHolder,
    /// The ledger is unreachable, so the right to show them is not known.
    LedgerAway,
    /// The state is behind an already shown sequence, or never reached the end of the ledger.
    Behind,
    /// The first backfill is running.
    Backfilling,
    /// The ledger was restored from a backup and has not caught up: it has less than was already
    /// shown.
    Recovering,
    /// The source of the request is not known.
    Source(NoSource),
}

impl Withheld {
    /// The reason as a label value.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Withheld::NotHolder => "not_holder",
            Withheld::LedgerAway => "ledger_away",
            Withheld::Behind => "behind",
            Withheld::Backfilling => "backfilling",
            Withheld::Recovering => "recovering",
            Withheld::Source(NoSource::Unknown(_)) => "unknown_source",
            Withheld::Source(NoSource::NoneYet) => "no_source",
            Withheld::Source(NoSource::Several) => "several_sources",
        }
    }

    /// All reasons, so that each counter exists from the start.
    pub(super) const REASONS: [&str; 8] = [
        "not_holder",
        "ledger_away",
        "behind",
        "backfilling",
        "recovering",
        "unknown_source",
        "no_source",
        "several_sources",
    ];
}
