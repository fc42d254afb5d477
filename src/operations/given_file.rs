//! Reads files named on the command line.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Reads a file of at most this number of bytes. Stops there, because a device may be endless.
pub(super) fn text(path: &Path, most_bytes: usize) -> Result<String, String> {
    let unreadable = |error| format!("{} cannot be read: {error}", path.display());
    let mut text = String::new();
    let one_more = u64::try_from(most_bytes).unwrap_or(u64::MAX).saturating_add(1);
    File::open(path)
        .and_then(|file| file.take(one_more).read_to_string(&mut text))
        .map_err(unreadable)?;
    if text.len() > most_bytes {
        return Err(format!("{} has more than {most_bytes} bytes", path.display()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_to_its_end_or_not_at_all() {
        let file = std::env::temp_dir().join(format!("tallyline-given-{}", std::process::id()));
        std::fs::write(&file, "four").unwrap();
        assert_eq!(text(&file, 4).as_deref(), Ok("four"));
        assert!(text(&file, 3).unwrap_err().ends_with("more than 3 bytes"));
        std::fs::remove_file(&file).unwrap();
        assert!(text(&file, 4).unwrap_err().contains("cannot be read"));
        assert!(text(Path::new("/dev/zero"), 3).is_err());
    }
}
