//! What portraits promise.

use std::collections::HashSet;

use super::*;

fn portrait(identity: u64, style: Style, scene: Scene, pose: u64) -> Portrait {
    Portrait { identity: Identity::from_seed(identity), style, scene, pose: Pose::from_seed(pose) }
}

fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: u64 = a.as_raw().iter().zip(b.as_raw()).map(|(&a, &b)| u64::from(a.abs_diff(b))).sum();
    sum as f64 / a.as_raw().len() as f64
}

#[test]
fn rendering_the_shipped_portrait_again_gives_the_shipped_file() {
    let shipped = crate::data::load_image(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/portrait.png")).unwrap();
    let again = Portrait::shipped().render(128).image;
    assert_eq!(shipped.dimensions(), again.dimensions());
    // Platforms' sines differ in the last bit, which may carry over to the rounding of a pixel, never to more.
    let most = shipped.as_raw().iter().zip(again.as_raw()).map(|(&a, &b)| a.abs_diff(b)).max();
    assert!(most <= Some(1), "largest difference of a channel: {most:?}");
}

#[test]
fn equal_seeds_give_equal_pictures() {
    for style in Style::ALL {
        let portrait = portrait(5, style, Scene::Forest, 9);
        let (a, b) = (portrait.render(48), portrait.clone().render(48));
        assert_eq!(a.image, b.image, "{style:?}");
        assert_eq!(a.landmarks, b.landmarks);
    }
}

#[test]
fn every_style_and_scene_is_drawn_at_any_size() {
    for style in Style::ALL {
        for size in [1, 2, 7, 33] {
            assert_eq!(portrait(1, style, Scene::Snow, 2).render(size).image.dimensions(), (size, size));
        }
    }
    for scene in Scene::ALL {
        let image = portrait(1, Style::Photo, scene, 2).render(32).image;
        assert!(image.pixels().collect::<HashSet<_>>().len() > 100, "{scene:?} is blank");
    }
}

#[test]
fn styles_and_scenes_and_people_differ_visibly() {
    let photo = portrait(3, Style::Photo, Scene::Forest, 4).render(64).image;
    for style in &Style::ALL[1..] {
        let other = portrait(3, *style, Scene::Forest, 4).render(64).image;
        assert!(difference(&photo, &other) > 5.0, "{style:?}: {}", difference(&photo, &other));
    }
    let studio = portrait(3, Style::Photo, Scene::Studio, 4).render(64).image;
    for scene in &Scene::ALL[1..] {
        let other = portrait(3, Style::Photo, *scene, 4).render(64).image;
        assert!(difference(&studio, &other) > 2.0, "{scene:?}: {}", difference(&studio, &other));
    }
    let people: Vec<_> = (0..12).map(|seed| portrait(seed, Style::Photo, Scene::Studio, 4).render(64).image).collect();
    for (i, a) in people.iter().enumerate() {
        for b in &people[..i] {
            assert!(difference(a, b) > 2.0);
        }
    }
}

#[test]
fn a_thousand_people_are_all_different() {
    let people: HashSet<String> = (0..1000)
        .map(|seed| serde_json::to_string(&Identity { seed: 0, ..Identity::from_seed(seed) }).unwrap())
        .collect();
    assert_eq!(people.len(), 1000);
}

#[test]
fn landmarks_lie_where_the_face_is_in_the_order_of_arcface() {
    for seed in 0..60 {
        let style = Style::ALL[seed as usize % Style::ALL.len()];
        let rendered = portrait(seed, style, Scene::Studio, seed + 50).render(128);
        let [left_eye, right_eye, nose, left_mouth, right_mouth] = rendered.landmarks;
        assert!(rendered.landmarks.iter().flatten().all(|&v| (10.0..118.0).contains(&v)), "{:?}", rendered.landmarks);
        assert!(left_eye[0] + 10.0 < right_eye[0] && left_mouth[0] + 6.0 < right_mouth[0]);
        assert!(nose[1] > left_eye[1].min(right_eye[1]) && nose[1] < left_mouth[1].max(right_mouth[1]));
    }
}

#[test]
fn landmarks_mark_the_pupils_of_a_face_that_looks_at_the_viewer() {
    for seed in 0..10 {
        let identity = Identity { glasses: Glasses::None, ..Identity::from_seed(seed) };
        let portrait = Portrait { identity, style: Style::Photo, scene: Scene::Studio, pose: Pose::frontal() };
        let rendered = portrait.render(256);
        for eye in &rendered.landmarks[..2] {
            let darkest = (-4..=4)
                .flat_map(|dy| (-4..=4).map(move |dx| (dx, dy)))
                .map(|(dx, dy)| rendered.image.get_pixel((eye[0] as i32 + dx) as u32, (eye[1] as i32 + dy) as u32).0)
                .map(|p| p.iter().map(|&v| u32::from(v)).sum::<u32>())
                .min();
            assert!(darkest < Some(90), "no pupil at {eye:?} of person {seed}: {darkest:?}");
        }
    }
}

#[test]
fn landmarks_scale_with_the_picture() {
    let portrait = portrait(4, Style::WantedPoster, Scene::Hat, 8);
    let (small, large) = (portrait.render(64).landmarks, portrait.render(128).landmarks);
    for (a, b) in small.iter().flatten().zip(large.iter().flatten()) {
        assert!((2.0 * a - b).abs() < 1e-3);
    }
}

#[test]
fn captions_have_the_right_articles_and_no_loose_blanks() {
    assert_eq!(portrait(0, Style::OilPainting, Scene::Forest, 0).prompt(), "an oil painting of a face in a forest");
    assert_eq!(portrait(0, Style::Photo, Scene::Studio, 0).prompt(), "a photo of a face");
    for style in Style::ALL {
        for scene in Scene::ALL {
            let prompt = portrait(1, style, scene, 0).prompt();
            assert!(!prompt.contains("  ") && prompt.trim() == prompt, "{prompt:?}");
            for pair in prompt.split(' ').collect::<Vec<_>>().windows(2) {
                let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
                assert!(pair[0] != "a" || !vowel, "{prompt}");
                assert!(pair[0] != "an" || vowel, "{prompt}");
            }
        }
    }
}

#[test]
fn a_described_prompt_compresses_to_the_prompt() {
    for seed in 0..100 {
        let portrait = portrait(seed, Style::Watercolor, Scene::Astronaut, seed);
        let description = portrait.identity.description();
        assert!(portrait.described_prompt().contains(&description));
        let compressed = crate::data::compress_prompt(&portrait.described_prompt(), &description, "a face");
        assert_eq!(compressed, portrait.prompt());
    }
}

#[test]
fn portraits_survive_json() {
    let portrait = portrait(11, Style::Neon, Scene::Knight, 12);
    let json = serde_json::to_string(&portrait).unwrap();
    let back: Portrait = serde_json::from_str(&json).unwrap();
    assert_eq!(back.render(32).image, portrait.render(32).image);
}
