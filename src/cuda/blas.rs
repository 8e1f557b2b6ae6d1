//! Matrix products through cuBLASLt, or the kernel of our own where it is faster: plans are made, and for large products
//! timed, once a shape, then cached.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::sys::{CUevent_flags, CUstreamCaptureStatus};
use candle_core::{CudaDevice, DType};

use super::{Buffer, HopperLinear, dtype_code};
use crate::{Error, Result};

/// A matrix on the GPU as a product reads it: `rows` by `columns` numbers, and how they are stored.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub pointer: *const c_void,
    pub rows: usize,
    pub columns: usize,
    /// Numbers between two stored rows (stored columns, where `transposed`).
    pub stride: usize,
    /// Stored column by column.
    pub transposed: bool,
}

impl Operand {
    /// Stored row by row, without gaps.
    pub fn new(pointer: *const c_void, rows: usize, columns: usize) -> Self {
        Operand { pointer, rows, columns, stride: columns, transposed: false }
    }

    /// The transpose of the same numbers.
    pub fn t(self) -> Self {
        Operand { rows: self.columns, columns: self.rows, transposed: !self.transposed, ..self }
    }
}

/// `out = scale * left . right + addend + bias`, `out` of `left.rows` by `right.columns` numbers stored row by row.
/// Accumulates in f32; f32 products are exact f32 (no TF32).
pub(crate) struct Gemm {
    /// Of both operands.
    pub dtype: DType,
    pub left: Operand,
    pub right: Operand,
    pub scale: f32,
    /// A matrix like `out` to be added (it may be `out` itself), of the dtype of `out`.
    pub addend: Option<*const c_void>,
    /// One number a column, to be added; of the dtype of `out`.
    pub bias: Option<*const c_void>,
    pub out: *mut c_void,
    pub out_dtype: DType,
    /// Products of this many pairs of matrices, and the distances between their beginnings: left, right, out.
    pub batch: (usize, [usize; 3]),
}

/// Bytes a product may use as scratch memory; what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// How many algorithms are timed against each other.
const CANDIDATES: usize = 8;
/// Products of fewer floating-point operations take the heuristic's first choice untimed.
const WORTH_TIMING: f64 = 5e8;
/// The family of kernels that cuBLASLt's products are, to be avoided where there are others.
const CUBLASLT: &str = "cublaslt";
/// A row of timed runs does about so many operations, in at most so many runs.
const TIMED_WORK: f64 = 1e11;
const MOST_RUNS: f64 = 10.0;

#[derive(PartialEq, Eq, Hash)]
struct Key {
    stream: usize,
    dtypes: (DType, DType),
    size: [usize; 3],
    strides: [usize; 2],
    transposed: [bool; 2],
    addend: bool,
    bias: bool,
    batch: (usize, [usize; 3]),
    alignment: u32,
    deterministic: bool,
}

struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: Algorithm,
}

/// What does a product.
#[derive(Clone, Copy)]
enum Algorithm {
    CublasLt(sys::cublasLtMatmulAlgo_t),
    /// [`HopperLinear`].
    Hopper,
}

struct Handle {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
    /// Scratch memory, one a stream.
    workspaces: HashMap<usize, Arc<Buffer>>,
}

// SAFETY: handle and plans are only used under the mutex that holds them; cuBLASLt's objects belong to no thread.
unsafe impl Send for Handle {}

fn failed(error: CublasError) -> Error {
    Error::device("matrix product", format!("cuBLASLt: {error:?}"))
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        other => Err(Error::argument("matrix product", "dtype", "f32, bf16 or f16 on a GPU", format!("{other:?}"))),
    }
}

/// Runs a product on the device's stream.
pub(crate) fn gemm(device: &CudaDevice, product: &Gemm) -> Result<()> {
    static HANDLE: OnceLock<Mutex<Option<Handle>>> = OnceLock::new();
    let (m, n, k) = (product.left.rows, product.right.columns, product.left.columns);
    if k != product.right.rows {
        let found = format!("{k} and {}", product.right.rows);
        return Err(Error::argument("matrix product", "operands", "equal inner dimensions", found));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    let stream = device.cuda_stream();
    let mut guard = HANDLE.get_or_init(|| Mutex::new(None)).lock().unwrap_or_else(PoisonError::into_inner);
    let state = match &mut *guard {
        Some(state) => state,
        None => {
            let handle = result::create_handle().map_err(failed)?;
            guard.insert(Handle { handle, plans: HashMap::new(), workspaces: HashMap::new() })
        }
    };
    let stream_key = stream.cu_stream() as usize;
    let workspace = match state.workspaces.get(&stream_key) {
        Some(workspace) => workspace.clone(),
        None => {
            let workspace = Arc::new(Buffer::bytes(device, WORKSPACE)?);
            state.workspaces.insert(stream_key, workspace.clone());
            workspace
        }
    };
    let pointers = [product.left.pointer as usize, product.right.pointer as usize, product.out as usize];
    let others = [product.addend.map_or(0, |p| p as usize), product.bias.map_or(0, |p| p as usize)];
    let alignment = 1u32 << pointers.iter().chain(&others).fold(256, |bits, p| bits | p).trailing_zeros();
    let key = Key {
        stream: stream_key,
        dtypes: (product.dtype, product.out_dtype),
        size: [m, n, k],
        strides: [product.left.stride, product.right.stride],
        transposed: [product.left.transposed, product.right.transposed],
        addend: product.addend.is_some(),
        bias: product.bias.is_some(),
        batch: product.batch,
        alignment,
        deterministic: super::deterministic(),
    };
    let launch = Launch { handle: state.handle, product, workspace: workspace.pointer(), device };
    let plan = match state.plans.entry(key) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(launch.plan(alignment)?),
    };
    launch.run(plan, &plan.algorithm)
}

/// One product about to be launched.
struct Launch<'a> {
    handle: sys::cublasLtHandle_t,
    product: &'a Gemm,
    workspace: *mut c_void,
    device: &'a CudaDevice,
}

impl Launch<'_> {
    /// cuBLASLt stores matrices column by column: our row-wise `out` is its transpose, the product of the transposed
    /// operands in the other order.
    fn plan(&self, alignment: u32) -> Result<Plan> {
        let product = self.product;
        let (dtype, out_dtype) = (data_type(product.dtype)?, data_type(product.out_dtype)?);
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
                .map_err(failed)?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let set = |attribute, value: &i32| {
            // SAFETY: these attributes are 32-bit integers.
            unsafe { result::set_matmul_desc_attribute(description, attribute, (&raw const *value).cast(), 4) }
                .map_err(failed)
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(product.right.transposed))?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(product.left.transposed))?;
        if product.bias.is_some() {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        let stored = |operand: &Operand| {
            let (rows, columns) =
                if operand.transposed { (operand.columns, operand.rows) } else { (operand.rows, operand.columns) };
            // Stored row by row with `columns` numbers a row: cuBLASLt sees `columns` rows.
            result::create_matrix_layout(dtype, columns as u64, rows as u64, operand.stride as i64).map_err(failed)
        };
        let n = product.right.columns;
        let layouts = [
            stored(&product.right)?,
            stored(&product.left)?,
            result::create_matrix_layout(out_dtype, n as u64, product.left.rows as u64, n as i64).map_err(failed)?,
        ];
        let (count, [left, right, out]) = product.batch;
        if count > 1 {
            use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
            for (layout, distance) in layouts.iter().zip([right, left, out]) {
                let (count, distance) = (count as i32, distance as i64);
                // SAFETY: the attributes are a 32-bit and a 64-bit integer.
                unsafe {
                    let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
                    result::set_matrix_layout_attribute(*layout, attribute, (&raw const count).cast(), 4)
                        .map_err(failed)?;
                    let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                    result::set_matrix_layout_attribute(*layout, attribute, (&raw const distance).cast(), 8)
                        .map_err(failed)?;
                }
            }
        }
        let mut candidates = self.candidates(description, &layouts, alignment)?;
        if self.suits_hopper() {
            if super::avoids(CUBLASLT) && may_overwrite(product) && self.run_hopper().is_ok() {
                return Ok(Plan { description, layouts, algorithm: Algorithm::Hopper });
            }
            candidates.push(Algorithm::Hopper);
        }
        let mut plan = Plan { description, layouts, algorithm: candidates[0] };
        let work = 2.0 * product.left.rows as f64 * n as f64 * product.left.columns as f64 * count as f64;
        if work >= WORTH_TIMING
            && candidates.len() > 1
            && !super::deterministic()
            && !self.capturing()
            && may_overwrite(product)
        {
            plan.algorithm = self.fastest(&plan, &candidates)?;
        }
        Ok(plan)
    }

    fn candidates(
        &self,
        description: sys::cublasLtMatmulDesc_t,
        layouts: &[sys::cublasLtMatrixLayout_t; 3],
        alignment: u32,
    ) -> Result<Vec<Algorithm>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref().map_err(failed)?;
        let aligned = [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        let bytes = WORKSPACE;
        let mut found: [std::mem::MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>; CANDIDATES] =
            [const { std::mem::MaybeUninit::uninit() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: the attributes are a usize and 32-bit integers; `found` has room for `CANDIDATES` results, and
        // `count` says how many were written.
        let algorithms = unsafe {
            let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), size_of::<usize>())
                .map_err(failed)?;
            for attribute in aligned {
                result::set_matmul_pref_attribute(preference, attribute, (&raw const alignment).cast(), 4)
                    .map_err(failed)?;
            }
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description,
                layouts[0],
                layouts[1],
                layouts[2],
                layouts[2],
                preference,
                CANDIDATES as i32,
                found[0].as_mut_ptr(),
                &raw mut count,
            )
            .result()
            .map_err(failed)?;
            result::destroy_matmul_pref(preference).map_err(failed)?;
            found[..count.clamp(0, CANDIDATES as i32) as usize]
                .iter()
                .map(|result| Algorithm::CublasLt(result.assume_init().algo))
                .collect::<Vec<_>>()
        };
        if algorithms.is_empty() {
            let Gemm { left, right, dtype, .. } = self.product;
            let what = format!("({}, {}) x ({}, {}), {dtype:?}", left.rows, left.columns, right.rows, right.columns);
            return Err(Error::device("matrix product", format!("cuBLASLt has no algorithm for {what}")));
        }
        Ok(algorithms)
    }

    fn capturing(&self) -> bool {
        !matches!(self.device.cuda_stream().capture_status(), Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE))
    }

    /// Times the candidates on the very operands: the best of three rows of runs each, after one to warm up. A row is
    /// long enough that the host's launches, which are slower than a small product, do not count.
    fn fastest(&self, plan: &Plan, candidates: &[Algorithm]) -> Result<Algorithm> {
        let stream = self.device.cuda_stream();
        let error = |error| Error::device("matrix product", format!("timing: {error}"));
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(error);
        let (start, end) = (event()?, event()?);
        let Gemm { left, right, batch, .. } = self.product;
        let work = 2.0 * (left.rows * left.columns) as f64 * (right.columns * batch.0.max(1)) as f64;
        let runs = (TIMED_WORK / work).clamp(1.0, MOST_RUNS) as usize;
        let mut best = (f32::INFINITY, candidates[0]);
        for algorithm in candidates {
            // A candidate that fails is no candidate.
            if self.run(plan, algorithm).is_err() {
                continue;
            }
            for _ in 0..3 {
                start.record(&stream).map_err(error)?;
                for _ in 0..runs {
                    self.run(plan, algorithm)?;
                }
                end.record(&stream).map_err(error)?;
                let time = start.elapsed_ms(&end).map_err(error)?;
                if time < best.0 {
                    best = (time, *algorithm);
                }
            }
        }
        Ok(best.1)
    }

    /// Whether the product is that of a linear layer, of a kind that [`HopperLinear`] may take.
    fn suits_hopper(&self) -> bool {
        let Gemm { left, right, dtype, out_dtype, scale, batch, .. } = self.product;
        let plain = *scale == 1.0 && batch.0 == 1 && dtype == out_dtype;
        let rows = !left.transposed && left.stride == left.columns && right.transposed && right.stride == right.rows;
        plain && rows && matches!(dtype, DType::BF16 | DType::F16)
    }

    fn run_hopper(&self) -> Result<()> {
        let Gemm { left, right, dtype, addend, bias, out, .. } = self.product;
        let name = "matrix product";
        let size = |size: usize| {
            i32::try_from(size).map_err(|_| Error::argument(name, "operands", "less than 2^31 rows", size.to_string()))
        };
        let arguments = HopperLinear {
            x: left.pointer,
            weight: right.pointer,
            bias: bias.unwrap_or(std::ptr::null()),
            residual: addend.unwrap_or(std::ptr::null()),
            y: *out,
            rows: size(left.rows)?,
            inner: size(left.columns)?,
            columns: size(right.columns)?,
            dtype: dtype_code(name, *dtype)?,
            gated: 0,
        };
        match arguments.launch(name, self.device)? {
            true => Ok(()),
            false => Err(Error::device(name, "no kernel of our own takes this product")),
        }
    }

    fn run(&self, plan: &Plan, algorithm: &Algorithm) -> Result<()> {
        let algorithm = match algorithm {
            Algorithm::CublasLt(algorithm) => algorithm,
            Algorithm::Hopper => return self.run_hopper(),
        };
        let product = self.product;
        let (alpha, beta) = (product.scale, if product.addend.is_some() { 1f32 } else { 0.0 });
        // SAFETY: the plan was made for these shapes, strides and dtypes, and the operations hand in pointers to
        // tensors of them; the objects of the plan live as long as the cache.
        unsafe {
            if let Some(bias) = product.bias {
                let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                let size = size_of::<*const c_void>();
                result::set_matmul_desc_attribute(plan.description, attribute, (&raw const bias).cast(), size)
                    .map_err(failed)?;
            }
            result::matmul(
                self.handle,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.right.pointer,
                plan.layouts[0],
                product.left.pointer,
                plan.layouts[1],
                product.addend.unwrap_or(product.out),
                plan.layouts[2],
                product.out,
                plan.layouts[2],
                algorithm,
                self.workspace,
                WORKSPACE,
                self.device.cuda_stream().cu_stream().cast(),
            )
            .map_err(failed)
        }
    }
}

/// Whether running the product several times gives what running it once does.
fn may_overwrite(product: &Gemm) -> bool {
    product.addend.is_none_or(|addend| !std::ptr::eq(addend, product.out))
}
