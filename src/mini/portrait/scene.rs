//! Where a person is, or dressed as what.

use serde::{Deserialize, Serialize};

use super::canvas::Rgb;

/// Where a person is, or dressed as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Scene {
    Studio,
    Forest,
    Beach,
    CityAtNight,
    Space,
    Snow,
    Mountains,
    Desert,
    Underwater,
    Library,
    Garden,
    Sunset,
    Rain,
    Crown,
    Hat,
    Headphones,
    Scarf,
    Astronaut,
    Knight,
    Chef,
    Wizard,
    Pirate,
}

impl Scene {
    /// Every scene.
    pub const ALL: [Scene; 22] = [
        Scene::Studio,
        Scene::Forest,
        Scene::Beach,
        Scene::CityAtNight,
        Scene::Space,
        Scene::Snow,
        Scene::Mountains,
        Scene::Desert,
        Scene::Underwater,
        Scene::Library,
        Scene::Garden,
        Scene::Sunset,
        Scene::Rain,
        Scene::Crown,
        Scene::Hat,
        Scene::Headphones,
        Scene::Scarf,
        Scene::Astronaut,
        Scene::Knight,
        Scene::Chef,
        Scene::Wizard,
        Scene::Pirate,
    ];

    /// What follows "a face" in a caption; empty for the plain studio.
    pub fn phrase(self) -> &'static str {
        match self {
            Scene::Studio => "",
            Scene::Forest => "in a forest",
            Scene::Beach => "on a beach",
            Scene::CityAtNight => "in a city at night",
            Scene::Space => "in space",
            Scene::Snow => "in the snow",
            Scene::Mountains => "in the mountains",
            Scene::Desert => "in a desert",
            Scene::Underwater => "under water",
            Scene::Library => "in a library",
            Scene::Garden => "in a flower garden",
            Scene::Sunset => "at sunset",
            Scene::Rain => "in the rain",
            Scene::Crown => "wearing a crown",
            Scene::Hat => "wearing a hat",
            Scene::Headphones => "with headphones",
            Scene::Scarf => "wearing a scarf",
            Scene::Astronaut => "as an astronaut",
            Scene::Knight => "as a knight",
            Scene::Chef => "as a chef",
            Scene::Wizard => "as a wizard",
            Scene::Pirate => "as a pirate",
        }
    }

    /// The colour of the light in the scene, by which the person's colours are multiplied.
    pub(super) fn light(self) -> Rgb {
        match self {
            Scene::CityAtNight => [0.86, 0.84, 0.98],
            Scene::Space | Scene::Astronaut => [0.94, 0.95, 1.03],
            Scene::Underwater => [0.84, 0.98, 1.02],
            Scene::Sunset => [1.06, 0.95, 0.84],
            Scene::Desert | Scene::Beach => [1.04, 1.01, 0.96],
            Scene::Rain => [0.92, 0.95, 0.99],
            Scene::Library => [1.0, 0.95, 0.88],
            _ => [1.0; 3],
        }
    }
}
