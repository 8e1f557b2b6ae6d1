//! Prompts in file names, and their compressed form.

use std::path::Path;

/// What stands for the person in a prompt where nothing else is configured.
pub const DEFAULT_PLACEHOLDER: &str = "a face";

/// The word in file names that stands for the person.
const CONCEPT: &str = "conceptname";

/// The prompt in a file's name, as the official layout has it: the stem is split on `_`, parts of digits at its end are
/// dropped, and `conceptname` becomes `placeholder`.
///
/// ```
/// # use lcm_lookahead::data::prompt_from_path;
/// assert_eq!(prompt_from_path("x/A_pencil_drawing_of_conceptname_1234.jpg", "a face"), "A pencil drawing of a face");
/// ```
pub fn prompt_from_path(path: impl AsRef<Path>, placeholder: &str) -> String {
    let stem = path.as_ref().file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut parts: Vec<&str> = stem.split('_').filter(|part| !part.is_empty()).collect();
    while parts.last().is_some_and(|part| part.bytes().all(|b| b.is_ascii_digit())) {
        parts.pop();
    }
    parts.join(" ").replace(CONCEPT, placeholder)
}

/// Whether a file's name is a prompt: whether it has a place for the person.
pub(super) fn names_a_prompt(path: &str) -> bool {
    Path::new(path).file_stem().is_some_and(|stem| stem.to_string_lossy().contains(CONCEPT))
}

/// The file stem of a prompt and a seed: the inverse of [`prompt_from_path`], up to the first letter, which becomes a
/// capital as in the official sets, and characters that file names cannot hold, which become `-`.
///
/// ```
/// # use lcm_lookahead::data::file_stem_from_prompt;
/// assert_eq!(file_stem_from_prompt("a photo of a face in space", "a face", 7), "A_photo_of_conceptname_in_space_7");
/// ```
pub fn file_stem_from_prompt(prompt: &str, placeholder: &str, seed: u64) -> String {
    let prompt = if placeholder.is_empty() { prompt.to_owned() } else { prompt.replacen(placeholder, CONCEPT, 1) };
    let words: Vec<String> = prompt
        .split_whitespace()
        .map(|word| word.chars().map(|c| if c.is_alphanumeric() || "-.,'".contains(c) { c } else { '-' }).collect())
        .collect();
    let stem = format!("{}_{seed}", words.join("_"));
    let mut letters = stem.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// A full prompt with the person's description replaced by the placeholder (paper section 4.4, where the model learns
/// from prompts that do not describe the person).
///
/// The description is found whatever its case; a prompt without it comes back as it is.
///
/// ```
/// # use lcm_lookahead::data::compress_prompt;
/// let full = "a photo of an old Slavic female with tan skin in a forest";
/// assert_eq!(compress_prompt(full, "an old Slavic female with tan skin", "a face"), "a photo of a face in a forest");
/// ```
pub fn compress_prompt(full: &str, description: &str, placeholder: &str) -> String {
    let description = description.trim();
    if description.is_empty() {
        return full.to_owned();
    }
    // Only ASCII case is folded, which keeps byte positions; a match starts and ends at whole words.
    let (haystack, needle) = (full.to_ascii_lowercase(), description.to_ascii_lowercase());
    let whole = |start: usize| {
        let boundary = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
        boundary(full[..start].chars().next_back()) && boundary(full[start + needle.len()..].chars().next())
    };
    match haystack.match_indices(&needle).find(|(start, _)| whole(*start)) {
        Some((start, _)) => format!("{}{placeholder}{}", &full[..start], &full[start + needle.len()..]),
        None => full.to_owned(),
    }
}
