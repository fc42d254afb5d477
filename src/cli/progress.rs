//! Progress of a long command on stderr: a bar on a terminal, otherwise one line per tenth.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

/// Counts items up to a total, for one activity at a time.
pub(super) struct Progress {
    on_terminal: bool,
    /// Name of the counted items.
    of: &'static str,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    doing: &'static str,
    done: u64,
    total: u64,
    bar: Option<ProgressBar>,
    /// The last reported tenth.
    tenths: u64,
}

impl Progress {
    /// Progress of consecutive activities. `of` names the counted items. Shows nothing before the first activity.
    pub fn of_steps(of: &'static str) -> Progress {
        Progress { on_terminal: std::io::stderr().is_terminal(), of, shown: Mutex::default() }
    }

    /// Adds `more` finished items of `total`.
    pub fn add(&self, doing: &'static str, more: u64, total: u64) {
        let done = self.shown.lock().unwrap_or_else(PoisonError::into_inner).done + more;
        self.at(doing, done, total);
    }

    /// Sets the finished items of `total`. A total of offsets includes offsets without records.
    pub fn at(&self, doing: &'static str, done: u64, total: u64) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.doing != doing {
            shown.begin(doing, self.of, self.on_terminal);
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
            // ignore errors: stderr may be closed
            let _ = writeln!(std::io::stderr(), "{doing}: {done} of {total} {}", self.of);
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).end();
    }
}

impl Shown {
    fn begin(&mut self, doing: &'static str, of: &str, on_terminal: bool) {
        self.end();
        let template = format!("{{msg}} {{wide_bar}} {{human_pos}}/{{human_len}} {of} {{eta}}");
        let style = || ProgressStyle::with_template(&template);
        let bar = || ProgressBar::new(0).with_message(doing).with_style(style().unwrap_or_else(|_| ProgressStyle::default_bar()));
        *self = Shown { doing, bar: on_terminal.then(bar), ..Shown::default() };
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
