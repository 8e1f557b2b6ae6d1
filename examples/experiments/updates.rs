//! One update of the sum of both losses, or one of each.

use lcm_lookahead::train::config::UpdateMode;

use crate::ablation::WHOLE;
use crate::encoders::trained;
use crate::plan::{Plan, Row};
use crate::report::{encoder_sheet, encoder_table};

pub const PLAN: Plan = Plan {
    name: "updates",
    title: "Joint and alternating updates",
    rows: &[
        Row { title: "joint (the paper's text)", ..WHOLE },
        Row {
            name: "alternating",
            title: "alternating (the authors' code)",
            run: |s, u| trained(s, u, |config| config.update_mode = UpdateMode::Alternating),
        },
    ],
    table: encoder_table,
    sheet: encoder_sheet,
};
