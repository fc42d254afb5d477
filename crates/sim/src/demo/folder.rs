//! The data folder of the demo.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use tempfile::TempDir;

/// Root runs PostgreSQL as its own user, so every user may pass through the folder but not list it.
/// Its content is protected.
const MODE: u32 = 0o711;

/// A new folder. A temporary one is removed at the end.
#[derive(Debug)]
pub(super) struct Folder {
    pub path: PathBuf,
    _temporary: Option<TempDir>,
}

impl Folder {
    /// Creates a folder at `path`, or a temporary one.
    pub fn new(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            let folder = tempfile::Builder::new()
                .prefix("tallyline-demo-")
                .permissions(Permissions::from_mode(MODE))
                .tempdir();
            let folder = folder.context("temporary folder: cannot be created")?;
            return Ok(Folder { path: folder.path().to_owned(), _temporary: Some(folder) });
        };
        let path = std::path::absolute(path)?;
        if fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_some()) {
            bail!("{}: not empty; name a new folder", path.display());
        }
        fs::create_dir_all(&path)
            .with_context(|| format!("{}: cannot be created", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(MODE))
            .with_context(|| format!("{}: not owned by this user", path.display()))?;
        Ok(Folder { path, _temporary: None })
    }

    /// Creates a file that only its owner may read.
    pub fn create(&self, name: &str) -> anyhow::Result<(PathBuf, File)> {
        let path = self.path.join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("{}: cannot be created", path.display()))?;
        Ok((path, file))
    }
}
