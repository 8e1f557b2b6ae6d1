//! What each part of the method gains (table 2 of the paper).

use lcm_lookahead::TrainConfig;
use lcm_lookahead::lookahead::PreviewPath;

use crate::encoders::{adapter, portraits, trained, trained_on};
use crate::people::photographs;
use crate::plan::{Plan, Row};
use crate::report::{encoder_sheet, encoder_table};

/// The whole method; also a row of other experiments.
pub const WHOLE: Row = Row { name: "kv", title: "+ KV injection", run: |s, u| trained(s, u, |_| {}) };

pub const PLAN: Plan = Plan {
    name: "ablation",
    title: "Ablation (table 2)",
    rows: &[
        Row { name: "portraits", title: "(the portraits themselves)", run: portraits },
        Row { name: "text-only", title: "(text alone)", run: |s, u| adapter(s, u, 0.0) },
        Row { name: "adapter-1.0", title: "IP-Adapter, scale 1.0", run: |s, u| adapter(s, u, 1.0) },
        Row { name: "adapter-0.5", title: "IP-Adapter, scale 0.5", run: |s, u| adapter(s, u, 0.5) },
        Row {
            name: "photographs",
            title: "tuned to reconstruct photographs",
            run: |s, u| trained_on(s, u, photographs(s, u)?, without_lookahead),
        },
        Row { name: "data", title: "tuned on consistent data", run: |s, u| trained(s, u, without_lookahead) },
        Row {
            name: "x0",
            title: "+ identity loss through x0",
            run: |s, u| {
                trained(s, u, |config| {
                    config.adapter.kv_branch = false;
                    config.lookahead.through = PreviewPath::X0;
                })
            },
        },
        Row {
            name: "lcm",
            title: "+ identity loss through LCM",
            run: |s, u| trained(s, u, |config| config.adapter.kv_branch = false),
        },
        WHOLE,
    ],
    table: encoder_table,
    sheet: encoder_sheet,
};

/// The adapter branch and the diffusion loss alone.
fn without_lookahead(config: &mut TrainConfig) {
    config.adapter.kv_branch = false;
    config.lookahead.every_k_steps = 0;
}
