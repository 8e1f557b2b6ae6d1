//! What each branch of one trained encoder contributes to its pictures: drawn with both, and with either alone.

use anyhow::ensure;
use lcm_lookahead::{Guidance, Personalizer};

use crate::ablation::WHOLE;
use crate::encoders::{evaluate, run_folder};
use crate::outcome::Outcome;
use crate::plan::{Plan, Row, Unit};
use crate::report::{encoder_sheet, encoder_table};
use crate::setting::Setting;

pub const PLAN: Plan = Plan {
    name: "branches",
    title: "The branches of the whole method's encoder",
    rows: &[
        Row {
            name: "branches-adapter",
            title: "image tokens alone",
            run: |setting, unit| draw(setting, unit, 1.0, setting.guidance(false), false),
        },
        Row {
            name: "branches-reference",
            title: "reference keys and values alone",
            run: |setting, unit| draw(setting, unit, 0.0, setting.guidance(true), true),
        },
        Row {
            name: "branches-plain",
            title: "both, plain guidance",
            run: |setting, unit| draw(setting, unit, 1.0, setting.guidance(false), true),
        },
        Row {
            name: "branches-strong",
            title: "both, the reference's terms doubled",
            run: |setting, unit| {
                let guidance = match setting.guidance(true) {
                    Guidance::ThreeTerm { no_kv, full, kv } => {
                        Guidance::ThreeTerm { no_kv, full: 2.0 * full, kv: 2.0 * kv }
                    }
                    other => other,
                };
                draw(setting, unit, 1.0, guidance, true)
            },
        },
        // Measured first: the others draw with its encoder.
        Row { title: "both, as everywhere", ..WHOLE },
    ],
    table: encoder_table,
    sheet: encoder_sheet,
};

/// Judges what the encoder of the whole method draws with a guidance, with or without its reference.
fn draw(setting: &Setting, unit: Unit, scale: f64, guidance: Guidance, reference: bool) -> anyhow::Result<Outcome> {
    let trained = run_folder(setting, Unit { row: WHOLE.name, ..unit });
    ensure!(
        trained.is_dir(),
        "{}: no such folder. The row {} draws with the encoder of the row {}, which has to be measured before",
        trained.display(),
        unit.row,
        WHOLE.name
    );
    let resampler = &setting.adapter.resampler;
    let personalizer = Personalizer::from_checkpoint(setting.base.clone(), resampler, &trained)?;
    // Terms of no weight stand for what is left out.
    let guidance = match guidance {
        Guidance::Plain { scale } if !reference => Guidance::ThreeTerm { no_kv: scale, full: 0.0, kv: 0.0 },
        other => other,
    };
    evaluate(setting, unit, &personalizer, scale, guidance)
}
