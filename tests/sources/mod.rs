//! Reads Rust sources for `tests/arrows.rs`: the paths that each file names, and the files that
//! define them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One file of Rust, with its path relative to the repository.
pub struct Source {
    pub file: PathBuf,
    pub text: String,
}

/// A path that a file names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Import {
    pub file: PathBuf,
    /// The path from its crate on: `tallyline::log::Batch`, `sqlx::PgPool`.
    pub path: Vec<String>,
    /// The file that defines the item. None for a module and for an external crate.
    pub target: Option<PathBuf>,
}

/// A module, in a file of its own or inside one.
#[derive(Default)]
struct Module {
    file: PathBuf,
    /// Names that `use` lines bring into the module, with their paths as written.
    names: BTreeMap<String, Vec<String>>,
    /// Paths as written that end in `*`.
    globs: Vec<Vec<String>>,
    /// All paths as written, with whether the line is a `pub use`.
    paths: Vec<(Vec<String>, bool)>,
}

/// The modules of all crates, by their paths from the crate on.
pub struct Modules(BTreeMap<Vec<String>, Module>);

/// Maximum length of a chain of aliases. It ends the search at a name that is its own crate.
const MAX_ALIASES: usize = 8;

impl Modules {
    pub fn of(sources: &[Source]) -> Modules {
        let files: Vec<(&Path, Vec<String>)> =
            sources.iter().map(|source| (source.file.as_path(), tokens(&source.text))).collect();
        let moved: BTreeMap<PathBuf, String> =
            files.iter().flat_map(|(file, tokens)| moved_modules(file, tokens)).collect();
        let mut modules = Modules(BTreeMap::new());
        for (file, tokens) in &files {
            let mut path = module_of(file);
            if let Some(declared) = moved.get(*file) {
                path = declared.split("::").map(str::to_owned).collect();
            }
            modules.read(file, tokens, path);
        }
        modules
    }

    /// Reads one file into its module and the modules inside it.
    fn read(&mut self, file: &Path, tokens: &[String], mut path: Vec<String>) {
        let mut inline_depths = Vec::new();
        let (mut at, mut depth) = (0, 0);
        while at < tokens.len() {
            let module = self
                .0
                .entry(path.clone())
                .or_insert_with(|| Module { file: file.to_owned(), ..Module::default() });
            let before = at.checked_sub(1).map_or("", |before| tokens[before].as_str());
            match tokens[at].as_str() {
                "mod" if is_word(&tokens[at + 1]) && tokens[at + 2] == "{" => {
                    path.push(tokens[at + 1].clone());
                    inline_depths.push(depth);
                    (depth, at) = (depth + 1, at + 3);
                    continue;
                }
                "{" => depth += 1,
                "}" => {
                    depth -= 1;
                    if inline_depths.last() == Some(&depth) {
                        inline_depths.pop();
                        path.pop();
                    }
                }
                "use" => {
                    let is_public = before == "pub" || before == ")";
                    at = module.read_use(tokens, at + 1, &[], is_public);
                    continue;
                }
                word if is_word(word)
                    && before != "::"
                    && tokens.get(at + 1).is_some_and(|next| next == "::") =>
                {
                    let path: Vec<String> = path_at(&tokens[at..]).map(str::to_owned).collect();
                    at += 2 * path.len() - 1;
                    module.paths.push((path, false));
                    continue;
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Every path that a file names, except what a module re-exports of its own children.
    pub fn imports(&self) -> BTreeSet<Import> {
        let mut imports = BTreeSet::new();
        for (from, module) in &self.0 {
            for (written, is_public) in &module.paths {
                let path = self.absolute(from, written, 0).unwrap_or_else(|| written.clone());
                if !(*is_public && path.starts_with(from)) {
                    imports.insert(Import {
                        file: module.file.clone(),
                        target: self.target(&path, 0),
                        path,
                    });
                }
            }
        }
        imports
    }

    /// A path as written in a module, from the crate on. None: it leads into an external crate.
    fn absolute(&self, from: &[String], written: &[String], aliases: usize) -> Option<Vec<String>> {
        let (first, rest) = written.split_first()?;
        let join = |start: &[String]| Some([start, rest].concat());
        match first.as_str() {
            "crate" => return join(&from[..1]),
            "self" => return join(from),
            "super" => {
                let supers = rest.iter().take_while(|name| *name == "super").count();
                let parent = from.get(..from.len().checked_sub(1 + supers)?)?;
                return Some([parent, &rest[supers..]].concat());
            }
            _ => {}
        }
        let child = [from, std::slice::from_ref(first)].concat();
        if self.0.contains_key(&child) {
            return join(&child);
        }
        if aliases == MAX_ALIASES {
            return None;
        }
        let module = self.0.get(from)?;
        if let Some(alias) =
            module.names.get(first).filter(|alias| alias.as_slice() != std::slice::from_ref(first))
        {
            return self.absolute(from, alias, aliases + 1).and_then(|start| join(&start));
        }
        let in_glob = |glob: &Vec<String>| {
            let base = self.absolute(from, glob.split_last()?.1, aliases + 1)?;
            (base != from).then(|| self.absolute(&base, written, aliases + 1))?
        };
        module
            .globs
            .iter()
            .find_map(in_glob)
            .or_else(|| self.0.contains_key(std::slice::from_ref(first)).then(|| written.to_vec()))
    }

    /// The file that defines the item, behind re-exports.
    fn target(&self, path: &[String], aliases: usize) -> Option<PathBuf> {
        let depth = (1..=path.len()).rev().find(|depth| self.0.contains_key(&path[..*depth]))?;
        let (at, rest) = path.split_at(depth);
        let (name, rest) = rest.split_first()?;
        let module = &self.0[at];
        let alias = module.names.get(name).filter(|_| aliases < MAX_ALIASES);
        match alias.and_then(|alias| self.absolute(at, alias, aliases + 1)) {
            Some(start) => self.target(&[start.as_slice(), rest].concat(), aliases + 1),
            // An alias of an external crate's item has no file of ours.
            None if alias.is_some() => None,
            None => Some(module.file.clone()),
        }
    }
}

impl Module {
    /// Reads a `use` tree. Returns the place after it.
    fn read_use(
        &mut self,
        tokens: &[String],
        mut at: usize,
        prefix: &[String],
        is_public: bool,
    ) -> usize {
        let mut path = prefix.to_vec();
        loop {
            match tokens[at].as_str() {
                "::" => {}
                "{" => {
                    while tokens[at] != "}" {
                        at = self.read_use(tokens, at + 1, &path, is_public);
                    }
                    return at + 1;
                }
                "," | ";" | "}" => {
                    if path.len() > prefix.len() {
                        self.add_use(path, None, is_public);
                    }
                    return at;
                }
                "as" => {
                    self.add_use(path, Some(tokens[at + 1].clone()), is_public);
                    return at + 2;
                }
                "self" if !path.is_empty() => {
                    self.add_use(path, None, is_public);
                    return at + 1;
                }
                name => path.push(name.to_owned()),
            }
            at += 1;
        }
    }

    fn add_use(&mut self, path: Vec<String>, alias: Option<String>, is_public: bool) {
        match (path.last(), alias) {
            (Some(last), None) if last == "*" => self.globs.push(path.clone()),
            (Some(last), alias) => {
                drop(self.names.insert(alias.unwrap_or_else(|| last.clone()), path.clone()))
            }
            (None, _) => {}
        }
        self.paths.push((path, is_public));
    }
}

/// The module of a file: `tallyline::log` for `src/log/mod.rs`, `tallyline_sim` for
/// `crates/sim/src/lib.rs`.
fn module_of(file: &Path) -> Vec<String> {
    let names: Vec<&str> = file.iter().filter_map(|name| name.to_str()).collect();
    let (krate, inside) = match names.as_slice() {
        ["crates", krate, "src", inside @ ..] => {
            (format!("tallyline_{}", krate.replace('-', "_")), inside)
        }
        ["src", inside @ ..] => ("tallyline".to_owned(), inside),
        _ => panic!("{}: not a source", file.display()),
    };
    match inside {
        ["lib.rs"] => vec![krate],
        // A binary is a crate of its own.
        ["main.rs"] | ["bin", ..] => vec![format!("{krate}/{}", inside.join("/"))],
        _ => {
            let modules = inside
                .iter()
                .map(|name| name.trim_end_matches(".rs"))
                .filter(|name| *name != "mod");
            std::iter::once(krate).chain(modules.map(str::to_owned)).collect()
        }
    }
}

/// The files that `#[path = "…"] mod name;` moves to another module.
fn moved_modules(file: &Path, tokens: &[String]) -> Vec<(PathBuf, String)> {
    let moved = |part: &[String]| {
        let [path, _, name, bracket, word, module, _] = part else { return None };
        let is_moved = path == "path" && bracket == "]" && word == "mod";
        let folder = file.parent()?;
        is_moved.then(|| {
            (
                folder.join(name.trim_matches('"')),
                format!("{}::{module}", module_of(file).join("::")),
            )
        })
    };
    tokens.windows(7).filter_map(moved).collect()
}

/// The path that begins here, without what follows it.
fn path_at(tokens: &[String]) -> impl Iterator<Item = &str> {
    let ends = |pair: &&[String]| !is_word(&pair[0]);
    let count = tokens
        .chunks(2)
        .position(|pair| ends(&pair) || pair.get(1).is_none_or(|next| next != "::"));
    let last = count.unwrap_or(0);
    let words =
        if tokens.get(2 * last).is_some_and(|word| is_word(word)) { last + 1 } else { last };
    tokens.iter().step_by(2).take(words).map(String::as_str)
}

fn is_word(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// The words, the `::` and the other characters of a text, without comments and lifetimes. A string
/// is one token that begins with `"`.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (length, is_token) = if rest.starts_with("//") {
            (rest.find('\n').unwrap_or(rest.len()), false)
        } else if rest.starts_with("/*") {
            (rest.find("*/").map_or(rest.len(), |end| end + 2), false)
        } else if let Some((string, length)) = string(rest) {
            tokens.push(format!("\"{string}\""));
            (length, false)
        } else if first == '\'' {
            (character(rest), false)
        } else if word > 0 {
            (word, true)
        } else if rest.starts_with("::") {
            (2, true)
        } else {
            (first.len_utf8(), !first.is_whitespace())
        };
        if is_token {
            tokens.push(rest[..length].to_owned());
        }
        rest = &rest[length..];
    }
    tokens
}

/// The content of the string that begins here, and the length of the whole.
fn string(text: &str) -> Option<(&str, usize)> {
    let quote = text
        .find(|character: char| !matches!(character, 'b' | 'c' | 'r' | '#'))
        .filter(|at| text[*at..].starts_with('"'))?;
    let prefix = &text[..quote];
    let letters = prefix.trim_end_matches('#');
    let is_raw = matches!(letters, "r" | "br" | "cr");
    if !(is_raw || matches!(prefix, "" | "b" | "c")) {
        return None;
    }
    let inside = &text[quote + 1..];
    let end = if is_raw {
        inside.find(&format!("\"{}", &prefix[letters.len()..]))?
    } else {
        let mut is_escaped = false;
        inside.find(|character| {
            let ends = character == '"' && !is_escaped;
            is_escaped = character == '\\' && !is_escaped;
            ends
        })?
    };
    let hashes = if is_raw { prefix.len() - letters.len() } else { 0 };
    Some((&inside[..end], quote + 1 + end + 1 + hashes))
}

/// The length of the character literal that begins here; of a lifetime, only its mark and its name.
fn character(text: &str) -> usize {
    let mut inside = text[1..].char_indices();
    match (inside.next(), inside.next()) {
        (Some((_, '\\')), Some((escaped, _))) => {
            let after = 1 + escaped + 1;
            text[after..].find('\'').map_or(text.len(), |end| after + end + 1)
        }
        (Some(_), Some((end, '\''))) => 1 + end + 1,
        _ => {
            1 + text[1..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len() - 1)
        }
    }
}
