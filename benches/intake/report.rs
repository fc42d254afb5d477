//! The printed report: every value, and medians.

use anyhow::Result;
use sqlx::{Connection as _, PgConnection};

use super::consuming::Consumed;

/// One round at one size.
pub struct Pair {
    pub consumed: Consumed,
    pub copy_seconds: f64,
}

/// All rounds at one size.
pub struct Size {
    pub events: u32,
    pub pairs: Vec<Pair>,
}

impl Pair {
    fn ratio(&self) -> f64 {
        self.copy_seconds / self.consumed.seconds
    }
}

/// The servers and the machine of the figures.
pub async fn surroundings(server: &str) -> Result<()> {
    let mut connection = PgConnection::connect(server).await?;
    let version: String = sqlx::query_scalar("select version()").fetch_one(&mut connection).await?;
    let cpus = std::thread::available_parallelism()?;
    println!("{version}\n{cpus} CPUs, load average {}", load());
    Ok(())
}

pub fn pair(round: usize, pair: &Pair) {
    let Consumed { first_batch_seconds, seconds, peak_kib } = pair.consumed;
    println!(
        "round {}: intake {seconds:.2} s (first batch after {first_batch_seconds:.2} s, peak {} MiB), limit {:.2} s, ratio {:.2}, load {}",
        round + 1,
        peak_kib / 1024,
        pair.copy_seconds,
        pair.ratio(),
        load(),
    );
}

/// The last minute's load average; it includes this program and its two servers.
fn load() -> String {
    let averages = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    averages.split_whitespace().next().unwrap_or("unknown").to_owned()
}

/// The medians of each size, and the memory of the largest against the smallest.
pub fn summary(sizes: &[Size]) {
    println!("\n    events  intake events/s  limit rows/s  ratio  peak MiB");
    for Size { events, pairs } in sizes {
        let rate = |seconds: f64| f64::from(*events) / seconds;
        println!(
            "{events:>10} {:>16.0} {:>13.0} {:>6.2} {:>9.0}",
            median(pairs, |pair| rate(pair.consumed.seconds)),
            median(pairs, |pair| rate(pair.copy_seconds)),
            median(pairs, Pair::ratio),
            peak_mib(pairs),
        );
    }
    if let [first, .., last] = sizes {
        println!(
            "peak memory at {} events: {:.2} of that at {}",
            last.events,
            peak_mib(&last.pairs) / peak_mib(&first.pairs),
            first.events
        );
    }
}

fn peak_mib(pairs: &[Pair]) -> f64 {
    median(pairs, |pair| {
        f64::from(u32::try_from(pair.consumed.peak_kib).unwrap_or(u32::MAX)) / 1024.0
    })
}

fn median(pairs: &[Pair], value: impl Fn(&Pair) -> f64) -> f64 {
    let mut values: Vec<f64> = pairs.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}
