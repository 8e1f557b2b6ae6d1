//! How strongly timesteps favour noise (section 4.2 of the paper).

use lcm_lookahead::TrainConfig;

use crate::ablation::WHOLE;
use crate::encoders::trained;
use crate::plan::{Plan, Row};
use crate::report::{encoder_sheet, encoder_table};

pub const PLAN: Plan = Plan {
    name: "annealing",
    title: "Timestep annealing (section 4.2)",
    rows: &[
        Row { name: "annealing-0", title: "a = 0 (uniform)", run: |s, u| trained(s, u, |config| anneal(config, 0.0)) },
        Row { title: "a = 0.2 (the paper's)", ..WHOLE },
        Row { name: "annealing-0.5", title: "a = 0.5", run: |s, u| trained(s, u, |config| anneal(config, 0.5)) },
    ],
    table: encoder_table,
    sheet: encoder_sheet,
};

fn anneal(config: &mut TrainConfig, alpha: f64) {
    config.timesteps.diffusion_annealing = alpha;
    config.timesteps.lookahead_annealing = alpha;
}
