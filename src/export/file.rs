//! A file that is there whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Written beside its final place and moved there when it is complete. Dropped before that, nothing of it stays.
#[derive(Debug)]
pub struct ExportFile {
    writer: Option<BufWriter<File>>,
    part: PathBuf,
    path: PathBuf,
}

/// Where the unfinished file is: `FILE.part`.
#[must_use]
pub fn part_path(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    PathBuf::from(part)
}

impl ExportFile {
    /// Begins a file. What an earlier run left unfinished is written over.
    ///
    /// # Errors
    /// The system's.
    pub fn create(path: &Path) -> io::Result<ExportFile> {
        if path.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "is a directory"));
        }
        let part = part_path(path);
        Ok(ExportFile { writer: Some(BufWriter::new(File::create(&part)?)), part, path: path.to_owned() })
    }

    /// Makes it durable and moves it to its place, over whatever was there.
    ///
    /// # Errors
    /// The system's; then nothing is moved.
    pub fn finish(mut self) -> io::Result<()> {
        if let Some(writer) = self.writer.take() {
            // until the rename has happened, dropping self removes the part
            let file = writer.into_inner().map_err(io::IntoInnerError::into_error);
            let moved = file.and_then(|file| file.sync_all()).and_then(|()| std::fs::rename(&self.part, &self.path));
            if let Err(error) = moved {
                let _ = std::fs::remove_file(&self.part);
                return Err(error);
            }
        }
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    }
}

impl Write for ExportFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.as_mut().map_or(Ok(0), |writer| writer.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for ExportFile {
    fn drop(&mut self) {
        if self.writer.is_some() {
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

/// Passes bytes on and knows their SHA-256.
pub struct Hashed<W> {
    writer: W,
    hash: Sha256,
}

impl<W: Write> Hashed<W> {
    /// Nothing is written yet.
    pub fn new(writer: W) -> Self {
        Hashed { writer, hash: Sha256::new() }
    }

    /// Of all that was written.
    pub fn sha256(self) -> [u8; 32] {
        self.hash.finalize().into()
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.writer.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("usage.csv");
        let entries = || std::fs::read_dir(folder.path()).expect("readable").count();
        std::fs::write(&path, "old").expect("written");

        let mut unfinished = ExportFile::create(&path).expect("created");
        unfinished.write_all(b"half").expect("written");
        assert!(part_path(&path).exists());
        drop(unfinished);
        assert_eq!((std::fs::read_to_string(&path).expect("there"), entries()), ("old".into(), 1));

        let mut whole = ExportFile::create(&path).expect("created");
        whole.write_all(b"new").expect("written");
        whole.finish().expect("moved");
        assert_eq!((std::fs::read_to_string(&path).expect("there"), entries()), ("new".into(), 1));
        assert!(ExportFile::create(folder.path()).is_err());
        assert!(ExportFile::create(&folder.path().join("no/such/folder")).is_err());
    }
}
