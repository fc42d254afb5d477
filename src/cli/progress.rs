//! How far a long command is, on stderr: a bar on a terminal, else a line for each tenth.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

/// Counts records up to a total.
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    /// What was done, and the tenths that were told.
    Lines(Mutex<(u64, u64)>),
}

impl Progress {
    /// A progress of `total` records, offsets that hold none included.
    pub fn new(what: &'static str, total: u64) -> Progress {
        let shown = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {human_pos}/{human_len} records {eta}");
            let bar = ProgressBar::new(total).with_message(what);
            Shown::Bar(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
        } else {
            Shown::Lines(Mutex::new((0, 0)))
        };
        Progress { what, total, shown }
    }

    /// So many more are done.
    pub fn add(&self, records: u64) {
        match &self.shown {
            Shown::Bar(bar) => bar.inc(records),
            Shown::Lines(state) => {
                let Ok(mut state) = state.lock() else { return };
                state.0 += records;
                let tenths = (state.0 * 10).checked_div(self.total).unwrap_or(10);
                if tenths > state.1 {
                    state.1 = tenths;
                    // nobody may be reading
                    let _ = writeln!(std::io::stderr(), "{}: {} of {} records", self.what, state.0, self.total);
                }
            }
        }
    }

    /// The bar goes.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}
