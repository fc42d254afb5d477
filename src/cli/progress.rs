//! Progress of a long command on stderr: a bar on a terminal, otherwise one line per tenth.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

/// Counts items up to a total, for one activity at a time. Shows nothing before the first activity.
#[derive(Default)]
pub(super) struct Progress(Mutex<Shown>);

#[derive(Default)]
struct Shown {
    doing: String,
    bar: Option<ProgressBar>,
    /// The last reported tenth.
    tenths: u64,
}

impl Progress {
    /// Sets the finished items of `total`. A total of offsets includes offsets without records.
    pub fn at(&self, (doing, items): (&str, &str), done: u64, total: u64) {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.doing != doing {
            shown.begin(doing, items);
        }
        if let Some(bar) = &shown.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        let tenths = if done == 0 { 0 } else { (done * 10).checked_div(total).unwrap_or(10) };
        if tenths > shown.tenths {
            shown.tenths = tenths;
            // ignore errors: stderr may be closed
            let _ = writeln!(std::io::stderr(), "{doing}: {done} of {total} {items}");
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).end();
    }
}

impl Shown {
    fn begin(&mut self, doing: &str, items: &str) {
        self.end();
        let template = format!("{{msg}} {{wide_bar}} {{human_pos}}/{{human_len}} {items} {{eta}}");
        let style = ProgressStyle::with_template(&template);
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = || ProgressBar::new(0).with_message(doing.to_owned()).with_style(style);
        *self = Shown {
            doing: doing.to_owned(),
            bar: std::io::stderr().is_terminal().then(bar),
            tenths: 0,
        };
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
