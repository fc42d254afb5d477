//! How far a long command is, on stderr: a bar on a terminal, else a line for each tenth.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

/// Counts records up to a total, of one thing that is done after the other.
pub(super) struct Progress {
    on_terminal: bool,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    doing: &'static str,
    done: u64,
    total: u64,
    bar: Option<ProgressBar>,
    /// The tenths that were told.
    tenths: u64,
}

impl Progress {
    /// Of one thing that is done, of `total` records, offsets that hold none included.
    pub fn new(doing: &'static str, total: u64) -> Progress {
        let progress = Progress::of_steps();
        progress.at(doing, 0, total);
        progress
    }

    /// Of several things that are done one after the other. Nothing is shown before the first.
    pub fn of_steps() -> Progress {
        Progress { on_terminal: std::io::stderr().is_terminal(), shown: Mutex::default() }
    }

    /// So many more are done.
    pub fn add(&self, records: u64) {
        let (doing, done, total) = {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            (shown.doing, shown.done + records, shown.total)
        };
        self.at(doing, done, total);
    }

    /// So many of `total` records are done, offsets that hold none included in the total.
    pub fn at(&self, doing: &'static str, done: u64, total: u64) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.doing != doing {
            shown.begin(doing, self.on_terminal);
        }
        (shown.done, shown.total) = (done, total);
        if let Some(bar) = &shown.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        let tenths = if done == 0 { 0 } else { (done * 10).checked_div(total).unwrap_or(10) };
        if tenths > shown.tenths {
            shown.tenths = tenths;
            // nobody may be reading
            let _ = writeln!(std::io::stderr(), "{doing}: {done} of {total} records");
        }
    }

    /// The bar goes.
    pub fn finish(&self) {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).end();
    }
}

impl Shown {
    fn begin(&mut self, doing: &'static str, on_terminal: bool) {
        self.end();
        let style = || ProgressStyle::with_template("{msg} {wide_bar} {human_pos}/{human_len} records {eta}");
        let bar = || ProgressBar::new(0).with_message(doing).with_style(style().unwrap_or_else(|_| ProgressStyle::default_bar()));
        *self = Shown { doing, bar: on_terminal.then(bar), ..Shown::default() };
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
