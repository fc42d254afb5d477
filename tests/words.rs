//! Holds the closed list of words that the text of the repository does not use: in comments,
//! messages, pages, and names of functions and variables.

use std::path::{Path, PathBuf};

/// The folders to read.
const FOLDERS: &[&str] = &[
    "src",
    "crates",
    "tests",
    "benches",
    "migrations",
    "scripts",
    ".ci",
    "pipelines",
    "dashboards",
    "docs",
];
/// The extensions of the files to read at the top level.
const TOP_LEVEL: &[&str] = &["md", "toml"];
/// Quoted input.
const QUOTED: &str = "tests/fuzz/corpus";

/// The file with the list, and the edges of the list in it.
const THIS_FILE: &str = "tests/words.rs";
const LIST_BEGINS: &str = "\nconst CLOSED_LIST:";
const LIST_ENDS: &str = "\n];";

/// Each entry is a phrase. `|` separates the words that may be at one place; `*` is any word.
const CLOSED_LIST: &[&str] = &[
    "nobody",
    "whoever",
    "somebody",
    "anew",
    "so many",
    "is|are|was|were no *",
    "stands|stood",
    "in hand",
    "what was|is left|found|said|read|shown",
];

const ANY: &str = "*";

/// A word of a file. `StandardName` and `standard_name` are two words each.
struct Word<'a> {
    text: &'a str,
    line: usize,
    /// Whether only a space, a line break or an underscore separates it from the word before.
    continues: bool,
}

#[test]
fn the_closed_list_is_not_used() {
    let uses: Vec<String> = files().iter().flat_map(|(file, text)| matches(file, text)).collect();
    assert!(
        uses.is_empty(),
        "{} uses of the closed list; see tests/words.rs:\n{}",
        uses.len(),
        uses.join("\n")
    );
}

#[test]
fn all_folders_are_read() {
    let files = files();
    for folder in FOLDERS.iter().chain(&["README.md", "Cargo.toml"]) {
        assert!(
            files.iter().any(|(file, _)| file.starts_with(folder)),
            "{folder}: no file was read"
        );
    }
}

#[test]
fn each_phrase_matches_in_sentences_and_names() {
    for phrase in CLOSED_LIST {
        for words in spellings(phrase) {
            let name: String =
                words.iter().map(|word| word[..1].to_uppercase() + &word[1..]).collect();
            let sentence = words.join(" ");
            for text in [
                format!("/// Text: {sentence}, and more."),
                format!("/// Text {}\n/// {}.", words[0], words[1..].join(" ")),
                format!("fn before_{}_after() {{}}", words.join("_")),
                format!("struct {name};"),
                format!("# {}", sentence.to_uppercase()),
            ] {
                assert_eq!(
                    matches(Path::new("x"), &text),
                    [format!("x:1: {}", sentence)],
                    "{text}"
                );
            }
        }
    }
    let plain = "It is: no. Understood, standard; what, was found? Is(no) so far many";
    assert_eq!(matches(Path::new("x"), plain), Vec::<String>::new());
}

/// Every spelling of a phrase, word by word.
fn spellings(phrase: &'static str) -> Vec<Vec<&'static str>> {
    phrase.split(' ').fold(vec![Vec::new()], |spellings, place| {
        let words = place.split('|').map(|word| if word == ANY { "example" } else { word });
        words
            .flat_map(|word| {
                spellings.iter().map(move |before| [before.as_slice(), &[word]].concat())
            })
            .collect()
    })
}

/// The uses of the closed list in a text: file, line and match.
fn matches(file: &Path, text: &str) -> Vec<String> {
    let words = words(text);
    let places =
        |phrase: &&'static str| phrase.split(' ').map(|place| place.split('|').collect()).collect();
    let phrases: Vec<Vec<Vec<&str>>> = CLOSED_LIST.iter().map(places).collect();
    let mut uses = Vec::new();
    for at in 0..words.len() {
        for phrase in &phrases {
            let Some(part) = words.get(at..at + phrase.len()) else { continue };
            let fits = part.iter().zip(phrase).all(|(word, place)| word.is_one_of(place));
            if fits && part[1..].iter().all(|word| word.continues) {
                let part: Vec<String> = part.iter().map(|word| word.text.to_lowercase()).collect();
                uses.push(format!("{}:{}: {}", file.display(), words[at].line, part.join(" ")));
            }
        }
    }
    uses
}

impl Word<'_> {
    fn is_one_of(&self, words: &[&str]) -> bool {
        words.iter().any(|word| *word == ANY || self.text.eq_ignore_ascii_case(word))
    }
}

/// The words of a text. The parts of a name are words of their own.
fn words(text: &str) -> Vec<Word<'_>> {
    let (mut words, mut line, mut end) = (Vec::new(), 1, 0);
    while let Some(length) = text[end..].find(|c: char| c.is_ascii_alphabetic()) {
        let start = end + length;
        let gap = &text[end..start];
        line += gap.matches('\n').count();
        end = start + word_length(&text[start..]);
        words.push(Word { text: &text[start..end], line, continues: continues(gap) });
    }
    words
}

/// The length of the first word: up to the next capital letter, or as long as all are capitals.
fn word_length(text: &str) -> usize {
    let letters = text.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(text.len());
    let capitals = text.find(|c: char| !c.is_ascii_uppercase()).unwrap_or(text.len());
    match capitals {
        0 | 1 => text[1..letters]
            .find(|c: char| c.is_ascii_uppercase())
            .map_or(letters, |length| length + 1),
        _ if capitals == letters => letters,
        _ => capitals - 1,
    }
}

/// Whether a phrase goes on after this gap. A new line may begin with the mark of a comment.
fn continues(gap: &str) -> bool {
    let marks = if gap.contains('\n') { "/!*#-\\" } else { "_" };
    gap.chars().all(|c| c.is_whitespace() || marks.contains(c))
}

/// All files, with their paths relative to the repository.
fn files() -> Vec<(PathBuf, String)> {
    let repository: PathBuf =
        std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test").into();
    let top = std::fs::read_dir(&repository).unwrap().map(|entry| entry.unwrap().path());
    let is_page = |path: &PathBuf| {
        path.extension().is_some_and(|extension| TOP_LEVEL.iter().any(|top| extension == *top))
    };
    let below = FOLDERS.iter().flat_map(|folder| files_below(&repository.join(folder)));
    let relative = |path: PathBuf| path.strip_prefix(&repository).unwrap().to_owned();
    let files =
        top.filter(is_page).chain(below).map(relative).filter(|file| !file.starts_with(QUOTED));
    let read = |file: PathBuf| {
        let text =
            String::from_utf8_lossy(&std::fs::read(repository.join(&file)).unwrap()).into_owned();
        let text = if file == Path::new(THIS_FILE) { without_the_list(&text) } else { text };
        (file, text)
    };
    files.map(read).collect()
}

/// This file without its list. The numbers of the lines remain.
fn without_the_list(text: &str) -> String {
    let start = text.find(LIST_BEGINS).expect("the list begins");
    let end = start + text[start..].find(LIST_ENDS).expect("the list ends");
    let lines = "\n".repeat(text[start..end].matches('\n').count());
    format!("{}{lines}{}", &text[..start], &text[end..])
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
