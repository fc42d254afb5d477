//! Where the demo keeps its data.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// A folder that every user may pass, for PostgreSQL runs as its own; removed at the end if it is a temporary one.
#[derive(Debug)]
pub(super) struct Folder {
    pub path: PathBuf,
    temporary: bool,
}

impl Folder {
    /// A new folder at `path`, or a temporary one.
    pub fn new(path: Option<&Path>) -> anyhow::Result<Self> {
        let (path, temporary) = match path {
            Some(path) => (std::path::absolute(path)?, false),
            None => (std::env::temp_dir().join(format!("tallyline-demo-{}", std::process::id())), true),
        };
        if fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_some()) {
            bail!("{} is not empty: the demo begins with a new folder", path.display());
        }
        fs::create_dir_all(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).with_context(|| format!("{} is not ours", path.display()))?;
        Ok(Folder { path, temporary })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(%error, folder = %self.path.display(), "the temporary folder is left behind");
        }
    }
}
