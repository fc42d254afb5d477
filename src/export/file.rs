//! The destination of an export. A regular file is replaced as a whole; a FIFO or a device receives
//! a stream.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

/// The owner may write, the group may read, others may not: usage names people's work.
const MODE: u32 = 0o640;

/// Maximum links in a chain, the same as in Linux.
const MAX_LINKS: u32 = 40;

/// An unfinished export. If it is dropped before [`ExportFile::finish`], a regular file remains as
/// it was.
#[derive(Debug)]
pub struct ExportFile(Destination);

#[derive(Debug)]
enum Destination {
    /// A FIFO, a device or a terminal: it gets the bytes immediately.
    Stream(BufWriter<File>),
    /// A regular file, existing or not. The export is written to a temporary file beside it and
    /// then moved.
    Replace { unfinished: BufWriter<NamedTempFile>, path: PathBuf },
}

/// Whether the export goes to standard output: `-`, or a path to the same file as standard output.
#[must_use]
pub fn is_stdout(path: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    path == Path::new("-")
        || identity(path).is_some_and(|file| Some(file) == identity(Path::new("/dev/stdout")))
}

impl ExportFile {
    /// Opens the destination. The system decides whether to follow a link. Opening a FIFO blocks
    /// until it has a reader.
    pub fn create(path: &Path) -> io::Result<ExportFile> {
        // check this before opening: the open decides whether the link may be followed, even if it
        // dangles
        let link = path.is_symlink();
        let opened = match OpenOptions::new().write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            opened => Some(opened?),
        };
        match opened {
            Some(file) if !file.metadata()?.is_file() => {
                Ok(ExportFile(Destination::Stream(BufWriter::new(file))))
            }
            Some(_) => Self::replace(path.canonicalize()?),
            None if link => Self::replace(end_of_link(path)?),
            None => Self::replace(path.to_owned()),
        }
    }

    fn replace(path: PathBuf) -> io::Result<ExportFile> {
        let name = path.file_name().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name")
        })?;
        let prefix = format!(".{}.", name.to_string_lossy());
        let mode = Permissions::from_mode(MODE);
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".part")
            .permissions(mode)
            .tempfile_in(folder(&path))?;
        Ok(ExportFile(Destination::Replace { unfinished: BufWriter::new(file), path }))
    }

    /// Writes all bytes. A regular file is made durable and replaces any file in its place. After
    /// an error no file is replaced.
    pub fn finish(self) -> io::Result<()> {
        match self.0 {
            Destination::Stream(mut writer) => writer.flush(),
            Destination::Replace { unfinished, path } => {
                let file = unfinished.into_inner().map_err(io::IntoInnerError::into_error)?;
                file.as_file().sync_all()?;
                file.persist(&path).map_err(|error| error.error)?;
                File::open(folder(&path))?.sync_all()
            }
        }
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The path at the end of a chain of links, existing or not. It is not created here, because
/// another export may create it meanwhile.
fn end_of_link(path: &Path) -> io::Result<PathBuf> {
    let mut end = path.to_owned();
    for _ in 0..MAX_LINKS {
        if !end.is_symlink() {
            return Ok(end);
        }
        end = folder(&end).canonicalize()?.join(fs::read_link(&end)?);
    }
    Err(io::Error::other("the path has more than 40 symbolic links"))
}

impl Write for ExportFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Destination::Stream(writer) => writer.write(bytes),
            Destination::Replace { unfinished, .. } => unfinished.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Destination::Stream(writer) => writer.flush(),
            Destination::Replace { unfinished, .. } => unfinished.flush(),
        }
    }
}

/// Forwards bytes and computes their SHA-256.
pub struct Hashed<W> {
    writer: W,
    hash: Sha256,
}

impl<W: Write> Hashed<W> {
    pub fn new(writer: W) -> Self {
        Hashed { writer, hash: Sha256::new() }
    }

    /// The hash of all written bytes.
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
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn entries(folder: &TempDir) -> usize {
        fs::read_dir(folder.path()).expect("readable").count()
    }

    fn export(path: &Path, text: &str) {
        let mut file = ExportFile::create(path).expect("created");
        file.write_all(text.as_bytes()).expect("written");
        file.finish().expect("in its place");
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(path).expect("there")
    }

    #[test]
    fn a_regular_file_is_replaced_as_a_whole() {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("usage.csv");
        fs::write(&path, "old").expect("written");

        let mut unfinished = ExportFile::create(&path).expect("created");
        unfinished.write_all(b"half").expect("written");
        assert_eq!(entries(&folder), 2, "it is written beside its place");
        drop(unfinished);
        assert_eq!((text(&path).as_str(), entries(&folder)), ("old", 1));

        export(&path, "new");
        assert_eq!((text(&path).as_str(), entries(&folder)), ("new", 1));
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, MODE);
        assert!(ExportFile::create(folder.path()).is_err());
        assert!(ExportFile::create(&folder.path().join("no/such/folder")).is_err());
    }

    #[test]
    fn two_exports_of_one_name_share_no_file() {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("usage.csv");
        let mut one = ExportFile::create(&path).expect("created");
        let mut other = ExportFile::create(&path).expect("created");
        one.write_all(b"one").expect("written");
        other.write_all(b"other").expect("written");
        one.finish().expect("in its place");
        assert_eq!(text(&path), "one");
        other.finish().expect("in its place");
        assert_eq!((text(&path).as_str(), entries(&folder)), ("other", 1));
    }

    #[test]
    fn a_link_is_followed_and_stays() {
        let folder = TempDir::new().expect("a folder");
        let [file, link, dangling] =
            ["2026-11.csv", "current.csv", "next.csv"].map(|name| folder.path().join(name));
        fs::write(&file, "old").expect("written");
        symlink("2026-11.csv", &link).expect("linked");
        symlink("2026-12.csv", &dangling).expect("linked");
        export(&link, "new");
        assert_eq!((link.is_symlink(), text(&file).as_str()), (true, "new"));
        export(&dangling, "next");
        assert_eq!(
            (dangling.is_symlink(), text(&folder.path().join("2026-12.csv")).as_str()),
            (true, "next")
        );
        assert_eq!(entries(&folder), 4);
    }

    #[test]
    fn two_exports_through_one_dangling_link_lose_no_file() {
        let folder = TempDir::new().expect("a folder");
        let [file, middle, link] =
            ["2026-12.csv", "middle.csv", "next.csv"].map(|name| folder.path().join(name));
        symlink("middle.csv", &link).expect("linked");
        symlink(&file, &middle).expect("linked");
        let ends: Vec<PathBuf> = (0..2)
            .map(|_| {
                export(&link, "whole");
                end_of_link(&link).expect("followed")
            })
            .collect();
        assert_eq!(
            (ends, text(&file).as_str()),
            (vec![file.canonicalize().expect("there"); 2], "whole")
        );
        assert!(link.is_symlink() && middle.is_symlink());
    }

    #[test]
    fn a_link_that_is_planted_for_the_unfinished_file_is_not_followed() {
        let folder = TempDir::new().expect("a folder");
        let [path, planted, victim] =
            ["usage.csv", "usage.csv.part", "victim"].map(|name| folder.path().join(name));
        fs::write(&victim, "whole").expect("written");
        symlink(&victim, &planted).expect("linked");
        export(&path, "usage");
        assert_eq!(
            (text(&victim).as_str(), text(&path).as_str(), path.is_symlink()),
            ("whole", "usage", false)
        );
    }

    #[test]
    fn a_device_and_a_fifo_receive_the_stream() {
        export(Path::new("/dev/null"), "usage");
        assert!(!fs::metadata("/dev/null").expect("there").is_file());

        let folder = TempDir::new().expect("a folder");
        let fifo = folder.path().join("fifo");
        assert!(
            std::process::Command::new("mkfifo").arg(&fifo).status().expect("run mkfifo").success()
        );
        let reader = std::thread::spawn({
            let fifo = fifo.clone();
            move || text(&fifo)
        });
        export(&fifo, "usage");
        assert_eq!((reader.join().expect("read").as_str(), entries(&folder)), ("usage", 1));
    }

    #[test]
    fn standard_output_is_known_by_any_of_its_names() {
        for name in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
            assert!(is_stdout(Path::new(name)), "{name}");
        }
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("usage.csv");
        assert!(!is_stdout(&path));
        fs::write(&path, "").expect("written");
        assert!(!is_stdout(&path));
    }
}
