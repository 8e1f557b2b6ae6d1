//! The example programs, as a user calls them. They are built by `cargo test` without a filter; where they are not there
//! the test says so.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use crate::common::portraits;
use crate::layout::{Layout, fixture};
use crate::server::Server;

fn program(name: &str) -> Option<PathBuf> {
    // <target>/<profile>/deps/<this test>
    let tests = std::env::current_exe().ok()?;
    let path = tests.parent()?.parent()?.join("examples").join(name);
    let there = path.is_file();
    if !there {
        println!("skipped: there is no {} (cargo build --release --examples)", path.display());
    }
    there.then_some(path)
}

fn run(program: &Path, layout: &Layout, variables: &[(&str, &str)], arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program);
    command
        .current_dir(layout.path())
        .env("HF_HOME", layout.path().join("home"))
        .args(["--model", "sdxl"])
        .args(arguments);
    for name in ["HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"] {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    command.output().with_context(|| program.display().to_string())
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn personalize_and_train_are_one_command_each() -> Result<()> {
    let (Some(personalize), Some(train)) = (program("personalize"), program("train")) else { return Ok(()) };
    let layout = Layout::new()?;
    let server = Server::start(layout.published()?)?;
    let image = fixture("sdxl_small/reference.png").display().to_string();
    let identity = ["--identity-network", "model_ir_se50.pth"];
    let draw = ["--image", &image, "--prompt", "a painting of a face", "--steps", "2", "--out", "drawn"];

    // From a hub, with everything but the identity network, which the user has.
    let hub = [("HF_ENDPOINT", server.origin.as_str())];
    let output = run(&personalize, &layout, &hub, &[&draw[..], &identity].concat())?;
    ensure!(output.status.success(), "{}", text(&output));
    ensure!(layout.path().join("drawn/01-a-painting-of-a-face.png").is_file(), "{}", text(&output));

    // From a folder, without network.
    portraits(&layout.path().join("data"), 2, 2)?;
    let offline = [("HF_HUB_OFFLINE", "1"), ("HF_HOME", "nowhere")];
    let few = [
        "--weights",
        "weights",
        "--data",
        "data",
        "--out",
        "run",
        "--steps",
        "2",
        "--batch",
        "2",
        "--validate-every",
        "0",
    ];
    let output = run(&train, &layout, &offline, &[&few[..], &identity].concat())?;
    ensure!(output.status.success(), "{}", text(&output));
    ensure!(layout.path().join("run/checkpoint-2/state.json").is_file(), "{}", text(&output));

    let again = ["--weights", "weights", "--checkpoint", "run", "--dtype", "f64"];
    let output = run(&personalize, &layout, &offline, &[&draw[..], &again, &identity].concat())?;
    ensure!(output.status.success(), "{}", text(&output));

    // What is missing, or not possible here, is one sentence.
    for (arguments, said) in [
        (vec!["--weights", "weights"], "opencv/face_recognition_sface"),
        (vec!["--weights", "nowhere"], "--weights nowhere: no such folder"),
        (vec![], "stabilityai/stable-diffusion-xl-base-1.0"),
        ([&["--weights", "weights", "--dtype", "bf16"][..], &identity].concat(), "the CPU computes in f32 and f64"),
    ] {
        let output = run(&personalize, &layout, &offline, &arguments)?;
        let message = String::from_utf8_lossy(&output.stderr).to_string();
        ensure!(!output.status.success() && message.lines().count() == 1, "{}", text(&output));
        ensure!(message.starts_with("error: ") && message.contains(said), "{message}");
    }
    Ok(())
}
