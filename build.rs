//! Compiles the CUDA kernels (`src/**/*.cu`) into a static library, under the feature `cuda` only.
//!
//! `CUDA_COMPUTE_CAP` (80, 90, ...) names the one architecture to build for, as it does for candle. Without it the
//! kernels are built for Ampere (sm_80, and PTX that newer GPUs compile for themselves) and for Hopper (sm_90a, whose
//! tensor-core and copy instructions exist there alone). `CUDA_HOME`, or `nvcc` on the PATH, says which toolkit.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(reason) = compile() {
        // The one way a build script has to say why it stops.
        println!("cargo::error={reason}");
    }
}

fn compile() -> Result<()> {
    for variable in ["CUDA_COMPUTE_CAP", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=src");
    let out = PathBuf::from(std::env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
    let (mut sources, mut headers) = (Vec::new(), Vec::new());
    collect(Path::new("src"), &mut sources, &mut headers)?;
    sources.sort();
    if sources.is_empty() {
        return Ok(());
    }
    let architectures = architectures()?;
    let toolkit = std::env::var_os("CUDA_HOME").or_else(|| std::env::var_os("CUDA_PATH")).map(PathBuf::from);
    let nvcc = toolkit.as_ref().map(|root| root.join("bin/nvcc")).filter(|nvcc| nvcc.exists());
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    // Objects made with other flags, or of another clone that shares the target folder, lie in another folder.
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    root.hash(&mut hasher);
    let flags = architectures.join("-").replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    let objects = out.join(format!("{flags}-{:016x}", hasher.finish()));
    std::fs::create_dir_all(&objects).map_err(|e| format!("{}: {e}", objects.display()))?;

    let newest_header = headers.iter().map(|path| modified(path)).max().unwrap_or(SystemTime::UNIX_EPOCH);
    let object = |source: &Path| {
        let name = source.with_extension("o").to_string_lossy().replace(['/', '\\'], "_");
        objects.join(name)
    };
    let stale = sources.iter().filter(|source| {
        let made = modified(&object(source));
        made <= modified(source) || made <= newest_header
    });
    let queue: Mutex<Vec<&PathBuf>> = Mutex::new(stale.collect());
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some(source) = queue.lock().ok().and_then(|mut queue| queue.pop()) else { return };
                    if let Err(reason) = compile_one(&nvcc, source, &object(source), &architectures) {
                        failures.lock().map(|mut failures| failures.push(reason)).ok();
                    }
                }
            });
        }
    });
    if let Some(reason) = failures.lock().ok().and_then(|mut failures| failures.pop()) {
        return Err(reason);
    }
    let library = out.join("liblcm_lookahead_kernels.a");
    std::fs::remove_file(&library).ok();
    run(Command::new(&nvcc).arg("--lib").arg("-o").arg(&library).args(sources.iter().map(|source| object(source))))?;
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=lcm_lookahead_kernels");
    if let Some(root) = toolkit {
        println!("cargo::rustc-link-search=native={}", root.join("lib64").display());
    }
    println!("cargo::rustc-link-lib=dylib=cudart");
    Ok(())
}

/// All `.cu` files and all headers below a folder.
fn collect(folder: &Path, sources: &mut Vec<PathBuf>, headers: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for entry in entries {
        let path = entry.map_err(|e| format!("{}: {e}", folder.display()))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            _ if path.is_dir() => collect(&path, sources, headers)?,
            Some("cu") => sources.push(path),
            Some("cuh" | "h") => headers.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// The values of nvcc's `-gencode`.
fn architectures() -> Result<Vec<String>> {
    let code = |capability: u32| {
        // Hopper's own instructions need the architecture-specific target.
        let name = if capability == 90 { "90a".into() } else { capability.to_string() };
        format!("arch=compute_{name},code=sm_{name}")
    };
    match std::env::var("CUDA_COMPUTE_CAP") {
        Ok(given) => match given.trim().trim_end_matches('a').replace('.', "").parse::<u32>() {
            Ok(capability @ 80..) => Ok(vec![code(capability)]),
            _ => {
                Err(format!("CUDA_COMPUTE_CAP is `{given}`: the kernels need compute capability 80 (Ampere) or newer"))
            }
        },
        Err(_) => Ok(vec!["arch=compute_80,code=[sm_80,compute_80]".into(), code(90)]),
    }
}

fn modified(path: &Path) -> SystemTime {
    path.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn compile_one(nvcc: &Path, source: &Path, object: &Path, architectures: &[String]) -> Result<()> {
    let mut command = Command::new(nvcc);
    // No exceptions and no guarded statics: the launchers then need nothing of the C++ runtime library.
    command.args([
        "-c",
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fPIC,-fno-exceptions,-fno-threadsafe-statics",
    ]);
    for architecture in architectures {
        command.arg("-gencode").arg(architecture);
    }
    run(command.arg(source).arg("-o").arg(object))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| {
        format!("cannot run `{program}` ({e}): the feature `cuda` needs the CUDA toolkit; set CUDA_HOME or put nvcc on the PATH")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    // A directive of a build script is one line.
    Err(format!("{program} failed: {}", String::from_utf8_lossy(&said).replace('\n', " | ")))
}
