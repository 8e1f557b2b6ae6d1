//! Who a portrait shows: the traits that stay the same in every style, scene and pose.

use rand::{Rng, seq::IndexedRandom};
use serde::{Deserialize, Serialize};

use super::canvas::{Rgb, lerp, mix};
use crate::random::Address;

/// How old a person looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Age {
    Young,
    Adult,
    Old,
}

/// How a person presents; decides the noun of the description, and how likely facial hair and lipstick are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Gender {
    Man,
    Woman,
}

/// How the hair is worn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum HairStyle {
    Bald,
    Buzz,
    Short,
    Spiky,
    Bob,
    Long,
    Curly,
    Afro,
    Bun,
    Mohawk,
    Ponytail,
    Braids,
}

/// The colour family of the hair; every person has a shade of their own within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum HairColor {
    Black,
    Brown,
    Blond,
    Red,
    Grey,
    White,
    Blue,
    Pink,
}

/// The colour of the irises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum EyeColor {
    Brown,
    Hazel,
    Green,
    Blue,
    Grey,
}

/// Hair on the lower face.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum FacialHair {
    None,
    Stubble,
    Moustache,
    Goatee,
    Beard,
}

/// Glasses that belong to the person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Glasses {
    None,
    Round,
    Square,
}

/// The traits of one person. Lengths are in units of the head's frame, in which a head is about 1.2 wide and 1.6 high;
/// traits without a unit lie in `[0, 1]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// The seed the person was drawn from.
    pub seed: u64,
    /// Young, adult or old.
    pub age: Age,
    /// Man or woman.
    pub gender: Gender,
    /// From the lightest (0) to the darkest (1) skin.
    pub skin_tone: f32,
    /// From a rosy (-1) to an olive (1) undertone.
    pub undertone: f32,
    /// Half the width of the head.
    pub face_width: f32,
    /// Half the height of the head.
    pub face_height: f32,
    /// From a narrow (0) to a square (1) jaw.
    pub jaw: f32,
    /// From a round (0) to a pointed, long (1) chin.
    pub chin: f32,
    /// Fullness of the cheeks.
    pub cheeks: f32,
    /// How the hair is worn.
    pub hair_style: HairStyle,
    /// Colour family of the hair.
    pub hair_color: HairColor,
    /// Shade within the family, from dark to light.
    pub hair_shade: f32,
    /// Volume of the hair.
    pub hair_volume: f32,
    /// Height of the hairline.
    pub hairline: f32,
    /// Whether the hair is parted on the right of the picture.
    pub part_right: bool,
    /// Colour of the irises.
    pub eye_color: EyeColor,
    /// Half the width of an eye.
    pub eye_width: f32,
    /// Half the opening of an eye.
    pub eye_height: f32,
    /// Distance of the eyes from the middle of the face.
    pub eye_spacing: f32,
    /// Slant of the eyes in radians, outer corners up where positive.
    pub eye_tilt: f32,
    /// Thickness of the brows.
    pub brow_thickness: f32,
    /// Slant of the brows in radians, outer ends up where positive.
    pub brow_tilt: f32,
    /// Arch of the brows.
    pub brow_arch: f32,
    /// Distance of the brows from the eyes.
    pub brow_height: f32,
    /// From the eyes to the tip of the nose.
    pub nose_length: f32,
    /// Half the width of the nose.
    pub nose_width: f32,
    /// How strongly the bridge of the nose shows.
    pub nose_bridge: f32,
    /// Half the width of the mouth.
    pub mouth_width: f32,
    /// Fullness of the lips.
    pub lip_fullness: f32,
    /// From lips of the skin's own colour (0) to lipstick (1).
    pub lip_color: f32,
    /// Size of the ears.
    pub ear_size: f32,
    /// Hair on the lower face.
    pub facial_hair: FacialHair,
    /// Whether the cheeks are freckled.
    pub freckles: bool,
    /// Where a mole sits, in the head's frame.
    pub mole: Option<[f32; 2]>,
    /// Glasses.
    pub glasses: Glasses,
    /// Colour of the glasses' frame, an index into a small palette.
    pub glasses_color: u8,
    /// Whether earrings are worn.
    pub earrings: bool,
}

impl Identity {
    /// The person of a seed. Equal seeds give equal persons; neighbouring seeds give unrelated ones.
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Address::new(seed, "portrait identity").rng();
        let rng = &mut rng;
        let woman = rng.random_bool(0.5);
        let age = match rng.random_range(0..10) {
            0..3 => Age::Young,
            3..7 => Age::Adult,
            _ => Age::Old,
        };
        let old = age == Age::Old;
        use HairStyle::*;
        let styles: &[HairStyle] = if woman {
            &[Bob, Bob, Long, Long, Curly, Afro, Bun, Ponytail, Braids, Short, Mohawk, Buzz]
        } else {
            &[Bald, Bald, Buzz, Short, Short, Spiky, Curly, Afro, Mohawk, Long, Bun]
        };
        let colors: &[HairColor] = if old {
            &[HairColor::Grey, HairColor::White, HairColor::Grey, HairColor::Black, HairColor::Red, HairColor::Blond]
        } else {
            &[
                HairColor::Black,
                HairColor::Black,
                HairColor::Brown,
                HairColor::Brown,
                HairColor::Blond,
                HairColor::Blond,
                HairColor::Red,
                HairColor::Red,
                HairColor::Blue,
                HairColor::Pink,
            ]
        };
        // The slices are not empty, so `choose` always finds one; the fallback only satisfies the types.
        let hair_style = styles.choose(rng).copied().unwrap_or(Short);
        let hair_color = colors.choose(rng).copied().unwrap_or(HairColor::Black);
        let facial_hair = match (woman || age == Age::Young && rng.random_bool(0.6), rng.random_range(0..8)) {
            (false, 0) => FacialHair::Stubble,
            (false, 1..3) => FacialHair::Moustache,
            (false, 3) => FacialHair::Goatee,
            (false, 4..6) => FacialHair::Beard,
            _ => FacialHair::None,
        };
        let glasses = match rng.random_range(0..10) {
            0..2 => Glasses::Round,
            2..4 => Glasses::Square,
            _ => Glasses::None,
        };
        let eye_color =
            [EyeColor::Brown, EyeColor::Hazel, EyeColor::Green, EyeColor::Blue, EyeColor::Grey][rng.random_range(0..5)];
        let mole = rng.random_bool(0.15).then(|| {
            let side = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
            [side * rng.random_range(0.2..0.36), rng.random_range(0.28..0.46)]
        });
        let mut between = |low: f32, high: f32| rng.random_range(low..high);
        let (wide, narrow) = if woman { (0.0, 1.0) } else { (1.0, 0.0) };
        let skin_tone = between(0.0, 1.0);
        Identity {
            seed,
            age,
            gender: if woman { Gender::Woman } else { Gender::Man },
            skin_tone,
            undertone: between(-1.0, 1.0),
            face_width: between(0.545, 0.65) + 0.025 * wide,
            face_height: between(0.74, 0.86),
            jaw: between(0.0, 0.75) + 0.25 * wide,
            chin: between(0.0, 1.0),
            cheeks: between(0.0, 1.0),
            hair_style,
            hair_color,
            hair_shade: between(0.0, 1.0),
            hair_volume: between(0.0, 1.0),
            hairline: between(0.0, 1.0),
            part_right: between(0.0, 1.0) < 0.5,
            eye_color,
            eye_width: between(0.125, 0.165) + 0.008 * narrow,
            eye_height: between(0.054, 0.094),
            eye_spacing: between(0.225, 0.285),
            eye_tilt: between(-0.14, 0.2),
            brow_thickness: between(0.018, 0.04) + 0.02 * wide * between(0.0, 1.0),
            brow_tilt: between(-0.16, 0.22),
            brow_arch: between(0.0, 0.07),
            brow_height: between(0.13, 0.19),
            nose_length: between(0.24, 0.36),
            nose_width: between(0.075, 0.14),
            nose_bridge: between(0.0, 1.0),
            mouth_width: between(0.155, 0.25),
            lip_fullness: between(0.0, 1.0),
            lip_color: if woman { between(0.1, 1.0) } else { between(0.0, 0.15) },
            ear_size: between(0.12, 0.19),
            facial_hair,
            freckles: skin_tone < 0.5 && between(0.0, 1.0) < 0.3,
            mole,
            glasses,
            glasses_color: between(0.0, 4.0) as u8,
            earrings: woman && between(0.0, 1.0) < 0.4,
        }
    }

    /// The colour of the skin, in sRGB components of `[0, 1]`.
    pub fn skin(&self) -> Rgb {
        const RAMP: [Rgb; 6] = [
            [0.99, 0.86, 0.78],
            [0.95, 0.77, 0.64],
            [0.86, 0.64, 0.48],
            [0.70, 0.47, 0.33],
            [0.51, 0.33, 0.23],
            [0.37, 0.24, 0.18],
        ];
        let position = self.skin_tone.clamp(0.0, 1.0) * 4.999;
        let index = position as usize;
        let base = mix(RAMP[index], RAMP[index + 1], position - index as f32);
        let u = 0.02 * self.undertone;
        [base[0] - u * 0.5, base[1] + u * 0.6, base[2] - u]
    }

    /// The colour of the hair, in sRGB components of `[0, 1]`.
    pub fn hair(&self) -> Rgb {
        let (dark, light) = match self.hair_color {
            HairColor::Black => ([0.07, 0.06, 0.07], [0.16, 0.13, 0.13]),
            HairColor::Brown => ([0.26, 0.15, 0.09], [0.46, 0.29, 0.17]),
            HairColor::Blond => ([0.78, 0.59, 0.28], [0.96, 0.83, 0.52]),
            HairColor::Red => ([0.58, 0.18, 0.07], [0.85, 0.37, 0.13]),
            HairColor::Grey => ([0.45, 0.45, 0.47], [0.62, 0.62, 0.64]),
            HairColor::White => ([0.82, 0.82, 0.82], [0.95, 0.94, 0.92]),
            HairColor::Blue => ([0.10, 0.27, 0.62], [0.22, 0.55, 0.85]),
            HairColor::Pink => ([0.78, 0.22, 0.47], [0.95, 0.52, 0.70]),
        };
        mix(dark, light, self.hair_shade)
    }

    /// The colour of the irises, in sRGB components of `[0, 1]`.
    pub fn iris(&self) -> Rgb {
        match self.eye_color {
            EyeColor::Brown => [0.34, 0.19, 0.10],
            EyeColor::Hazel => [0.55, 0.40, 0.16],
            EyeColor::Green => [0.25, 0.52, 0.28],
            EyeColor::Blue => [0.20, 0.47, 0.78],
            EyeColor::Grey => [0.48, 0.55, 0.60],
        }
    }

    /// The colour of the lips, in sRGB components of `[0, 1]`.
    pub fn lips(&self) -> Rgb {
        let skin = self.skin();
        let natural = [skin[0] * 0.86, skin[1] * 0.62, skin[2] * 0.64];
        mix(natural, [lerp(0.80, 0.55, self.skin_tone), 0.12, 0.22], self.lip_color * 0.75)
    }

    /// The person in words: "an old man with tan skin, curly red hair, round glasses and a moustache".
    pub fn description(&self) -> String {
        let noun = match self.gender {
            Gender::Man => "man",
            Gender::Woman => "woman",
        };
        let who = match self.age {
            Age::Young => format!("a young {noun}"),
            Age::Adult => format!("a {noun}"),
            Age::Old => format!("an old {noun}"),
        };
        let skin = ["pale", "fair", "tan", "brown", "dark"][((self.skin_tone * 5.0) as usize).min(4)];
        let color = match self.hair_color {
            HairColor::Black => "black",
            HairColor::Brown => "brown",
            HairColor::Blond => "blond",
            HairColor::Red => "red",
            HairColor::Grey => "grey",
            HairColor::White => "white",
            HairColor::Blue => "blue",
            HairColor::Pink => "pink",
        };
        let hair = match self.hair_style {
            HairStyle::Bald => "a bald head".to_owned(),
            HairStyle::Buzz => format!("very short {color} hair"),
            HairStyle::Short => format!("short {color} hair"),
            HairStyle::Spiky => format!("spiky {color} hair"),
            HairStyle::Bob => format!("a {color} bob"),
            HairStyle::Long => format!("long {color} hair"),
            HairStyle::Curly => format!("curly {color} hair"),
            HairStyle::Afro => format!("a {color} afro"),
            HairStyle::Bun => format!("{color} hair in a bun"),
            HairStyle::Mohawk => format!("a {color} mohawk"),
            HairStyle::Ponytail => format!("{color} hair in a ponytail"),
            HairStyle::Braids => format!("{color} braids"),
        };
        let mut features = vec![format!("{skin} skin"), hair];
        match self.glasses {
            Glasses::None => {}
            Glasses::Round => features.push("round glasses".to_owned()),
            Glasses::Square => features.push("square glasses".to_owned()),
        }
        match self.facial_hair {
            FacialHair::None => {}
            FacialHair::Stubble => features.push("stubble".to_owned()),
            FacialHair::Moustache => features.push("a moustache".to_owned()),
            FacialHair::Goatee => features.push("a goatee".to_owned()),
            FacialHair::Beard => features.push("a beard".to_owned()),
        }
        if self.freckles {
            features.push("freckles".to_owned());
        }
        let last = features.pop().unwrap_or_default();
        format!("{who} with {} and {last}", features.join(", "))
    }
}
