//! Drawing people, on a base whose networks all are tiny and random.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{FACE, RESOLUTION, portraits, tiny_adapter, tiny_base, tiny_config};
use lcm_lookahead::personalize::Options;
use lcm_lookahead::random::Address;
use lcm_lookahead::{Error, Guidance, Personalizer, Result, SamplerKind, Trainer};

fn personalizer() -> Result<Personalizer> {
    let folder = tempfile::tempdir().unwrap();
    let data = portraits(&folder.path().join("data"), 1, 2)?;
    let base = tiny_base(DType::F64, Some(FACE))?;
    Trainer::new(base, &tiny_adapter(), data, tiny_config(), folder.path())?.personalizer()
}

fn photographs(count: usize) -> Result<Tensor> {
    let shape = (3, RESOLUTION, RESOLUTION);
    Ok(Address::new(3, "photographs").normal_batch(count, shape, DType::F64, &Device::Cpu)?.clamp(-1.0, 1.0)?)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()?)
}

#[test]
fn several_people_are_drawn_in_one_batch_as_each_of_them_alone() -> Result<()> {
    let personalizer = personalizer()?;
    let options = Options { steps: 3, sampler: SamplerKind::Ddim, ..personalizer.default_options() };
    let prompts = ["an oil painting of a face", "a face in a forest", "a mosaic of a face"].map(String::from);
    let photographs = photographs(2)?;
    let people = personalizer.reference_from_tensor(&photographs)?;
    assert_eq!(people.people(), 2);
    let shown = [1, 0, 1];
    let together = personalizer.generate_tensor(&people.select(&shown)?, &prompts, &options)?;
    for (place, person) in shown.into_iter().enumerate() {
        let alone = personalizer.reference_from_tensor(&photographs.narrow(0, person, 1)?)?;
        let alone = personalizer.generate_tensor(&alone, &prompts, &options)?;
        assert!(distance(&together.get(place)?, &alone.get(place)?)? < 1e-9);
    }
    let swapped = personalizer.generate_tensor(&people.select(&[0, 0, 1])?, &prompts, &options)?;
    assert!(distance(&together.get(0)?, &swapped.get(0)?)? > 1e-6, "another person gives another picture");
    Ok(())
}

/// Pictures of two people in seven steps.
fn seven_steps(personalizer: &Personalizer, change: impl FnOnce(&mut Options)) -> Result<Tensor> {
    let mut options = Options { steps: 7, ..personalizer.default_options() };
    change(&mut options);
    let prompts = ["an oil painting of a face", "a face in a forest"].map(String::from);
    let people = personalizer.reference_from_tensor(&photographs(2)?)?;
    personalizer.generate_tensor(&people, &prompts, &options)
}

#[test]
fn how_many_steps_a_pass_of_the_kv_encoder_is_for_does_not_show_in_the_pictures() -> Result<()> {
    let personalizer = personalizer()?;
    for sampler in [SamplerKind::DpmSolverPlusPlus, SamplerKind::Lcm] {
        let draw = |reference_steps| {
            seven_steps(&personalizer, |options| {
                (options.sampler, options.reference_steps) = (sampler, reference_steps);
                if sampler == SamplerKind::Lcm {
                    options.guidance = Guidance::None;
                }
            })
        };
        let one_by_one = draw(1)?;
        for reference_steps in [2, 3, 100] {
            let together = draw(reference_steps)?;
            assert!(distance(&together, &one_by_one)? < 1e-9, "{sampler} {reference_steps}");
        }
    }
    let one_by_one = seven_steps(&personalizer, |options| options.reference_steps = 1)?;
    let default = seven_steps(&personalizer, |_| ())?;
    assert!(distance(&default, &one_by_one)? < 1e-9);
    // What the comparison is worth: without a reference the pictures are others.
    let without = seven_steps(&personalizer, |options| options.use_reference = false)?;
    assert!(distance(&without, &one_by_one)? > 1e-3);
    Ok(())
}

#[test]
fn keys_and_values_of_neighbouring_steps_are_near_to_a_steps_own() -> Result<()> {
    let personalizer = personalizer()?;
    let draw = |interval, steps| {
        seven_steps(&personalizer, |options| {
            (options.reference_interval, options.reference_steps) = (interval, steps);
        })
    };
    let own = draw(1, 1)?;
    let without = seven_steps(&personalizer, |options| options.use_reference = false)?;
    let (lost, all) = (distance(&draw(2, 1)?, &own)?, distance(&without, &own)?);
    println!("an interval of 2: {lost:.2e}, no reference: {all:.2e}");
    assert!(lost > 1e-6 && lost < 0.3 * all, "{lost} of {all}");
    assert!(distance(&draw(2, 3)?, &draw(2, 1)?)? < 1e-9);
    Ok(())
}

#[test]
fn at_least_one_step_is_asked_for() -> Result<()> {
    let personalizer = personalizer()?;
    for field in ["reference_steps", "reference_interval"] {
        let drawn = seven_steps(&personalizer, |options| match field {
            "reference_steps" => options.reference_steps = 0,
            _ => options.reference_interval = 0,
        });
        let Err(error @ Error::Argument { .. }) = drawn else { panic!("{field}: {drawn:?}") };
        assert!(error.to_string().contains(field) && error.to_string().contains("at least 1"), "{error}");
    }
    Ok(())
}

#[test]
fn as_many_photographs_as_prompts_are_asked_for() -> Result<()> {
    let personalizer = personalizer()?;
    let people = personalizer.reference_from_tensor(&photographs(2)?)?;
    let prompts = vec!["a photo of a face".to_string(); 3];
    let error = personalizer.generate_tensor(&people, &prompts, &personalizer.default_options()).unwrap_err();
    assert!(error.to_string().contains("1 photograph or 3"), "{error}");
    assert!(matches!(people.select(&[2]), Err(Error::Argument { .. })));
    Ok(())
}

#[test]
fn previews_of_several_pictures_are_those_of_each() -> Result<()> {
    let personalizer = personalizer()?;
    let options = personalizer.default_options();
    let prompts = ["an oil painting of a face", "a face in a forest"].map(String::from);
    let people = personalizer.reference_from_tensor(&photographs(2)?)?;
    let pictures = photographs(2)?;
    let together = personalizer.previews(&people, &prompts, &pictures, 499, &options)?;
    let first = personalizer.preview(&people.select(&[0])?, &prompts[0], &pictures.narrow(0, 0, 1)?, 499, &options)?;
    assert!(distance(&together.narrow(0, 0, 1)?, &first)? < 1e-9);
    assert!(distance(&together.get(0)?, &together.get(1)?)? > 1e-6);
    let error = personalizer.previews(&photographs_of_three(&personalizer)?, &prompts, &pictures, 499, &options);
    assert!(error.unwrap_err().to_string().contains("1 photograph or 2"));
    Ok(())
}

fn photographs_of_three(personalizer: &Personalizer) -> Result<lcm_lookahead::personalize::Reference> {
    personalizer.reference_from_tensor(&photographs(3)?)
}
