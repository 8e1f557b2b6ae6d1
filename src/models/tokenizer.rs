//! Prompts to token ids.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::{Error, Result};

/// Tokens of a prompt of the miniature, start and end included.
pub const MINI_LENGTH: usize = 32;
/// The miniature's end-of-text token; also its padding.
pub const MINI_END: u32 = 1;
const MINI_START: u32 = 0;
const MINI_UNKNOWN: u32 = 2;
const MINI_SPECIAL: [&str; 3] = ["[START]", "[END]", "[UNK]"];

/// Words of the descriptions, styles and scenes of the procedural portraits, and common words around them.
///
/// Written out and not gathered from the portraits, because a word's place is its id in trained weights: new words go
/// to the end. A test makes sure no caption has a word that is missing here.
const MINI_WORDS: &str = "a an the of in on at with and or by to from as is are for under over near front behind \
    photo photograph picture image portrait painting drawing sketch rendering style studio closeup close up selfie \
    face head person people human man woman boy girl young adult old child baby \
    skin pale fair tan brown dark olive light \
    hair very short long spiky curly straight wavy bald buzz bob afro bun mohawk ponytail braids braided \
    black blond blonde red grey gray white blue pink green hazel yellow orange purple violet golden silver teal \
    eyes eye nose mouth lips ear ears brow brows cheeks chin jaw forehead neck shoulders \
    beard moustache mustache goatee stubble freckles mole glasses round square earrings hat cap scarf lipstick \
    smiling laughing sad angry surprised neutral looking wearing happy serious \
    cartoon comic anime pixel pixelated mosaic watercolor watercolour oil pencil charcoal crayon chalk ink pen pop art \
    poster flat vector line lines halftone stained glass woodcut engraving linocut paper cut cutout collage origami \
    impressionist cubist expressionist abstract minimalist vintage sepia retro neon cyberpunk graffiti mural sticker \
    emoji statue marble bronze clay plastic toy wooden stone low poly 3d render \
    plain background wall room indoors outdoors outside street city town night day evening morning sunset sunrise \
    dusk dawn sky clouds cloudy sunny rain rainy snow snowy winter summer autumn spring forest woods park garden \
    flowers trees tree grass leaves meadow field hills hill mountain mountains desert dunes beach sea ocean sand lake \
    river water underwater island space stars moon planet galaxy fire bricks brick library books kitchen office cafe \
    bar concert stage museum castle bridge window curtain curtains gradient colorful colourful bright warm cold dim \
    soft dramatic lighting shadows high quality detailed blurry noisy black-and-white monochrome \
    comic book wanted sign print flower crown headphones astronaut knight chef wizard pirate";

/// The miniature's vocabulary: the token of index `i` has the id `i`. Special tokens first, then words in the order of
/// their first mention.
pub fn mini_vocabulary() -> Vec<&'static str> {
    let mut vocabulary: Vec<&str> = MINI_SPECIAL.to_vec();
    for word in MINI_WORDS.split_whitespace() {
        if !vocabulary.contains(&word) {
            vocabulary.push(word);
        }
    }
    vocabulary
}

/// A tokenizer that gives every prompt the same length, as CLIP wants it: start token, text, end token, padding.
#[derive(Clone, Debug)]
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    length: usize,
    start: u32,
    end: u32,
    padding: u32,
}

impl PromptTokenizer {
    /// CLIP's tokenizer from `vocab.json` and `merges.txt` as published in the `tokenizer` folders of SDXL: 77 tokens,
    /// lower case.
    ///
    /// `padding_token` is the token after the end: `"<|endoftext|>"` for the first text encoder of SDXL, `"!"` for the
    /// second.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file.
    pub fn clip(vocab: impl AsRef<Path>, merges: impl AsRef<Path>, padding_token: &str) -> Result<Self> {
        let (vocab, merges) = (vocab.as_ref(), merges.as_ref());
        let format = |path: &Path, reason: String| Error::Format { path: path.to_path_buf(), reason };
        let text = std::fs::read_to_string(vocab).map_err(Error::io("read", vocab))?;
        let vocabulary: Value =
            serde_json::from_str(&text).map_err(|error| format(vocab, format!("not a JSON vocabulary: {error}")))?;
        let text = std::fs::read_to_string(merges).map_err(Error::io("read", merges))?;
        let pairs: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with("#version")).collect();
        let id = |token: &str| -> Result<u32> {
            let found = vocabulary.get(token).and_then(Value::as_u64);
            found.and_then(|id| u32::try_from(id).ok()).ok_or_else(|| format(vocab, format!("has no token `{token}`")))
        };
        let (start, end, padding) = (id("<|startoftext|>")?, id("<|endoftext|>")?, id(padding_token)?);
        // As transformers' `CLIPTokenizer` defines it. A special token in the text of a prompt is that token; the
        // padding is one, so the second encoder of SDXL reads `!!` as two paddings, where the first reads one token.
        let words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
        let mut specials = vec![(start, "<|startoftext|>"), (end, "<|endoftext|>")];
        if padding != end {
            specials.push((padding, padding_token));
        }
        let special = |(id, content): (u32, &str)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        };
        let specials: Vec<Value> = specials.into_iter().map(special).collect();
        let definition = json!({
            "version": "1.0",
            "added_tokens": specials,
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "NFC" },
                { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
                { "type": "Lowercase" },
            ] },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": words }, "behavior": "Removed", "invert": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            ] },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
                "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": pairs,
            },
        });
        let tokenizer = build(&definition).map_err(|reason| format(merges, reason))?;
        Ok(PromptTokenizer { tokenizer, length: 77, start, end, padding })
    }

    /// CLIP's tokenizer from a `tokenizer.json`: 77 tokens. `padding_token` as for [`PromptTokenizer::clip`].
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file.
    pub fn clip_from_json(path: impl AsRef<Path>, padding_token: &str) -> Result<Self> {
        let path = path.as_ref();
        let format = |reason: String| Error::Format { path: path.to_path_buf(), reason };
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let mut tokenizer =
            Tokenizer::from_bytes(bytes).map_err(|error| format(std::format!("not a tokenizer: {error}")))?;
        // Length and padding are this type's own affair.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| format(error.to_string()))?;
        let id =
            |token: &str| tokenizer.token_to_id(token).ok_or_else(|| format(std::format!("has no token `{token}`")));
        let (start, end, padding) = (id("<|startoftext|>")?, id("<|endoftext|>")?, id(padding_token)?);
        let special = AddedToken::from(padding_token, true).normalized(false);
        tokenizer.add_special_tokens([special]).map_err(|error| format(error.to_string()))?;
        Ok(PromptTokenizer { tokenizer, length: 77, start, end, padding })
    }

    /// The miniature's tokenizer: lower-case words of [`mini_vocabulary`], punctuation ignored, any other word `[UNK]`;
    /// [`MINI_LENGTH`] tokens.
    ///
    /// # Errors
    /// None in practice: the vocabulary is part of the crate.
    pub fn mini() -> Result<Self> {
        let vocabulary: serde_json::Map<String, Value> =
            mini_vocabulary().into_iter().zip(0u32..).map(|(word, id)| (word.to_string(), id.into())).collect();
        let definition = json!({
            "version": "1.0",
            "added_tokens": [],
            "normalizer": { "type": "Lowercase" },
            "pre_tokenizer": {
                "type": "Split", "pattern": { "Regex": r"[\p{L}\p{N}]+(-[\p{L}\p{N}]+)*" },
                "behavior": "Removed", "invert": true,
            },
            "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": MINI_SPECIAL[MINI_UNKNOWN as usize] },
        });
        let tokenizer = build(&definition)
            .map_err(|reason| Error::Format { path: "(the miniature's tokenizer)".into(), reason })?;
        Ok(PromptTokenizer { tokenizer, length: MINI_LENGTH, start: MINI_START, end: MINI_END, padding: MINI_END })
    }

    /// Tokens of every encoded prompt.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Number of tokens of the vocabulary.
    pub fn vocabulary_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The ids of prompts, u32 `(batch, length)`. A prompt that is too long is cut off, with a warning.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no prompt, or one cannot be split into tokens.
    pub fn encode(&self, prompts: &[impl AsRef<str>], device: &Device) -> Result<Tensor> {
        if prompts.is_empty() {
            return Err(Error::argument("tokenizer", "prompts", "at least one", "none"));
        }
        let mut ids = Vec::with_capacity(prompts.len() * self.length);
        for prompt in prompts {
            ids.extend(self.encode_one(prompt.as_ref())?);
        }
        Ok(Tensor::from_vec(ids, (prompts.len(), self.length), device)?)
    }

    /// The end of a prompt that [`PromptTokenizer::encode`] cuts off, where the prompt is too long.
    ///
    /// # Errors
    /// [`Error::Argument`] where the prompt cannot be split into tokens.
    pub fn truncated(&self, prompt: &str) -> Result<Option<String>> {
        Ok(self.split(prompt)?.1)
    }

    /// The ids of the part of a prompt there is room for, and the rest of the prompt.
    fn split(&self, prompt: &str) -> Result<(Vec<u32>, Option<String>)> {
        let encoding = self.tokenizer.encode(prompt, false).map_err(|error| {
            Error::argument("tokenizer", "prompt", "text that can be split into tokens", format!("{prompt:?}: {error}"))
        })?;
        let (room, mut ids) = (self.length - 2, encoding.get_ids().to_vec());
        if ids.len() <= room {
            return Ok((ids, None));
        }
        let lost = match encoding.get_offsets().get(room).and_then(|&(from, _)| prompt.get(from..)) {
            Some(rest) => rest.to_string(),
            None => format!("{} tokens", ids.len() - room),
        };
        ids.truncate(room);
        Ok((ids, Some(lost)))
    }

    fn encode_one(&self, prompt: &str) -> Result<Vec<u32>> {
        let (text, lost) = self.split(prompt)?;
        if let Some(lost) = lost {
            tracing::warn!(prompt, lost, "the prompt is longer than {} tokens; its end is ignored", self.length - 2);
        }
        let mut ids = vec![self.start];
        ids.extend(text);
        ids.push(self.end);
        ids.resize(self.length, self.padding);
        Ok(ids)
    }
}

/// A tokenizer from a definition in the format of `tokenizer.json`.
fn build(definition: &Value) -> Result<Tokenizer, String> {
    Tokenizer::from_bytes(definition.to_string()).map_err(|error| format!("not a usable tokenizer: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mini::portrait::{Identity, Scene, Style};

    fn ids(tokenizer: &PromptTokenizer, prompt: &str) -> Result<Vec<u32>> {
        Ok(tokenizer.encode(&[prompt], &Device::Cpu)?.to_vec2::<u32>()?.remove(0))
    }

    #[test]
    fn a_mini_prompt_is_start_words_end_and_padding() -> Result<()> {
        let tokenizer = PromptTokenizer::mini()?;
        let vocabulary = mini_vocabulary();
        assert_eq!(tokenizer.vocabulary_size(), vocabulary.len());
        let ids = ids(&tokenizer, "A photo, of a FACE: zyx black-and-white!")?;
        let words: Vec<&str> = ids.iter().map(|&id| vocabulary[id as usize]).collect();
        assert_eq!(words[..9], ["[START]", "a", "photo", "of", "a", "face", "[UNK]", "black-and-white", "[END]"]);
        assert_eq!(ids.len(), MINI_LENGTH);
        assert!(ids[9..].iter().all(|&id| id == MINI_END));
        Ok(())
    }

    #[test]
    fn the_mini_knows_every_word_of_the_portraits_captions() -> Result<()> {
        let tokenizer = PromptTokenizer::mini()?;
        let phrases =
            Style::ALL.iter().map(|style| style.phrase()).chain(Scene::ALL.iter().map(|scene| scene.phrase()));
        let descriptions = (0..500).map(|seed| Identity::from_seed(seed).description());
        for caption in phrases.map(str::to_string).chain(descriptions).chain(["of a face".to_string()]) {
            assert!(!ids(&tokenizer, &caption)?.contains(&MINI_UNKNOWN), "{caption}");
        }
        Ok(())
    }

    #[test]
    fn a_long_prompt_is_cut_and_still_ends() -> Result<()> {
        let ids = ids(&PromptTokenizer::mini()?, &"face ".repeat(60))?;
        assert_eq!((ids.len(), ids[MINI_LENGTH - 1]), (MINI_LENGTH, MINI_END));
        assert!(ids[1..MINI_LENGTH - 1].iter().all(|id| Some(id) == ids.get(1)));
        let tokenizer = PromptTokenizer::mini()?;
        let prompt = format!("{}and a hat", "face ".repeat(MINI_LENGTH - 2));
        assert_eq!(tokenizer.truncated(&prompt)?.as_deref(), Some("and a hat"));
        assert_eq!(tokenizer.truncated("face ".repeat(MINI_LENGTH - 2).trim_end())?, None);
        Ok(())
    }

    #[test]
    fn an_empty_prompt_is_start_and_end() -> Result<()> {
        let ids = ids(&PromptTokenizer::mini()?, "")?;
        assert_eq!(ids[..3], [MINI_START, MINI_END, MINI_END]);
        Ok(())
    }

    #[test]
    fn clip_merges_lower_case_pieces_and_pads_as_told() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("create", "a folder"))?;
        let (vocab, merges) = (folder.path().join("vocab.json"), folder.path().join("merges.txt"));
        let pieces = ["!", "c", "a", "t", "t</w>", "s</w>", "'", "ca", "cat</w>", "'s</w>", "!</w>"];
        let mut map: serde_json::Map<String, Value> =
            pieces.iter().zip(0u32..).map(|(piece, id)| (piece.to_string(), id.into())).collect();
        map.insert("<|startoftext|>".into(), 100.into());
        map.insert("<|endoftext|>".into(), 101.into());
        std::fs::write(&vocab, Value::Object(map).to_string()).map_err(Error::io("write", &vocab))?;
        std::fs::write(&merges, "#version: 0.2\nc a\nca t</w>\n' s</w>\n").map_err(Error::io("write", &merges))?;
        let tokenizer = PromptTokenizer::clip(&vocab, &merges, "!")?;
        let ids = ids(&tokenizer, "  Cat's CAT!")?;
        // The padding is a special token, also where it is text.
        assert_eq!(ids[..8], [100, 8, 9, 8, 0, 101, 0, 0]);
        assert_eq!(ids.len(), 77);
        let error = PromptTokenizer::clip(&vocab, &merges, "?").unwrap_err().to_string();
        assert!(error.contains("vocab.json") && error.contains("`?`"), "{error}");
        Ok(())
    }
}
