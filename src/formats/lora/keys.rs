//! The names of LoRA tensors, taken apart.

/// Which network a layer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Component {
    UNet,
    TextEncoder,
}

/// What a tensor is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Down,
    Up,
    Alpha,
}

/// A name, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub component: Component,
    /// The layer, as the file names it: a path with dots, or with underscores (kohya).
    pub module: String,
    pub part: Part,
}

/// Endings, the longer of two that match first.
const ENDINGS: [(&str, Part); 15] = [
    (".lora_A.default.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".lora_layer.down.weight", Part::Down),
    (".lora_layer.up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".alpha", Part::Alpha),
];

/// Takes a name apart; `None` where it is no name of a LoRA.
pub(super) fn parse(name: &str) -> Option<Key> {
    let (mut module, part) = ENDINGS.iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?, *part)))?;
    for wrapper in ["base_model.model.", "diffusion_model."] {
        module = module.strip_prefix(wrapper).unwrap_or(module);
    }
    let prefixes = [
        ("unet.base_model.model.", Component::UNet),
        ("unet.", Component::UNet),
        ("lora_unet_", Component::UNet),
        ("text_encoder.", Component::TextEncoder),
        ("text_encoder_2.", Component::TextEncoder),
        ("lora_te_", Component::TextEncoder),
        ("lora_te1_", Component::TextEncoder),
        ("lora_te2_", Component::TextEncoder),
    ];
    let found = prefixes.iter().find_map(|(prefix, component)| Some((*component, module.strip_prefix(prefix)?)));
    let (component, module) = found.unwrap_or((Component::UNet, module));
    // The attention processors of diffusers before peft: `attn1.processor.to_out_lora` is `attn1.to_out.0`.
    let module = match module.split_once(".processor.") {
        Some((attention, projection)) => {
            let projection = projection.strip_suffix("_lora").unwrap_or(projection);
            let projection = if projection == "to_out" { "to_out.0" } else { projection };
            format!("{attention}.{projection}")
        }
        None => module.to_string(),
    };
    Some(Key { component, module, part })
}
