//! The thin layer below the rest: the object types that PyO3's macros are too slow for, and all `unsafe` code.
//!
//! What it exports is safe to use, with one rule that types cannot express: a closure given to
//! `Store::with` runs no Python code.

mod coroutine;
mod function;
mod object;
mod pool;
mod stop_iteration;
mod store;
#[cfg(Py_GIL_DISABLED)]
mod thread;
mod var;

pub use coroutine::{Coroutine, Sent, State};
pub use function::{Body, function};
pub use object::Object;
pub use store::Store;
pub use var::{current, current_function, reset, set};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

use pyo3::Borrowed;
use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::panic::PanicException;
use pyo3::prelude::*;

/// A Python object that lives as long as the process, for code that cannot afford more than a load.
struct Immortal<T = ffi::PyObject>(AtomicPtr<T>);

impl<T> Immortal<T> {
    const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// Null until the module is imported, and nothing that reads it can be reached before.
    #[inline(always)]
    fn get(&self) -> *mut T {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, object: Bound<'_, PyAny>) {
        immortalize(&object);
        self.0.store(object.into_ptr().cast(), Ordering::Release);
    }
}

/// Take an object that lives as long as the process out of reference counting, where threads would contend for it.
fn immortalize(object: &Bound<'_, PyAny>) {
    #[cfg(Py_GIL_DISABLED)]
    // SAFETY: this thread has just made the object, and no other knows of it yet.
    unsafe {
        let header = object.as_ptr();
        let forever = ffi::PyObject_HEAD_INIT;
        (*header).ob_tid = forever.ob_tid;
        (*header).ob_ref_local.store(forever.ob_ref_local.into_inner(), Ordering::Relaxed);
        (*header).ob_ref_shared.store(forever.ob_ref_shared.into_inner(), Ordering::Relaxed);
    }
    #[cfg(not(Py_GIL_DISABLED))]
    let _ = object;
}

/// Refuse to be imported by a second interpreter of the process: what is static here belongs to the first.
pub fn check_interpreter(_: Python<'_>) -> PyResult<()> {
    static FIRST: AtomicI64 = AtomicI64::new(-1);
    // SAFETY: the thread is attached, hence to an interpreter.
    let this = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    match FIRST.compare_exchange(-1, this, Ordering::Relaxed, Ordering::Relaxed) {
        Err(first) if first != this => {
            Err(PyImportError::new_err("ctxalchemy._native can be imported by only one interpreter of a process"))
        }
        _ => Ok(()),
    }
}

/// Make what the rest needs.
pub fn install(py: Python<'_>) -> PyResult<()> {
    var::install(py)?;
    Coroutine::install(py)
}

/// Make a type from its parts.
fn new_type<'py>(
    py: Python<'py>,
    name: &'static std::ffi::CStr,
    size: usize,
    flags: std::ffi::c_ulong,
    slots: &mut [ffi::PyType_Slot],
) -> PyResult<Bound<'py, PyAny>> {
    let mut spec = ffi::PyType_Spec {
        name: name.as_ptr(),
        basicsize: size as _,
        itemsize: 0,
        flags: (ffi::Py_TPFLAGS_DEFAULT | ffi::Py_TPFLAGS_HAVE_GC | flags) as _,
        slots: slots.as_mut_ptr(),
    };
    // SAFETY: the callers end the slots with a zeroed one, and name and tables they point to are static.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyType_FromSpec(&mut spec)) }
}

const fn slot<T>(id: std::ffi::c_int, value: *const T) -> ffi::PyType_Slot {
    ffi::PyType_Slot { slot: id, pfunc: value.cast_mut().cast() }
}

const fn member(name: &'static std::ffi::CStr, offset: usize) -> ffi::PyMemberDef {
    ffi::PyMemberDef {
        name: name.as_ptr(),
        type_code: ffi::Py_T_PYSSIZET,
        offset: offset as _,
        flags: ffi::Py_READONLY,
        doc: ptr::null(),
    }
}

/// The end of a list of members.
const NO_MEMBER: ffi::PyMemberDef = ffi::PyMemberDef { name: ptr::null(), ..member(c"", 0) };

/// The end of a list of getters.
const NO_GETTER: ffi::PyGetSetDef =
    ffi::PyGetSetDef { name: ptr::null(), get: None, set: None, doc: ptr::null(), closure: ptr::null_mut() };

/// An exception is set in the interpreter.
///
/// A `Result` with it is as wide as the value alone and stays in registers; with a `PyErr` it goes
/// through memory, which takes longer than a lookup.
pub struct Raised;

impl From<PyErr> for Raised {
    #[cold]
    fn from(error: PyErr) -> Self {
        Python::attach(|py| error.restore(py));
        Self
    }
}

/// What a function is called with.
pub type Argument<'a, 'py> = Borrowed<'a, 'py, PyAny>;

/// An object, or an exception.
pub type Outcome<'py, T = PyAny> = Result<Bound<'py, T>, Raised>;

/// What a function of the interpreter returned: an owned object, or null and an exception.
///
/// # Safety
/// It is that.
#[inline(always)]
unsafe fn outcome(py: Python<'_>, returned: *mut ffi::PyObject) -> Outcome<'_> {
    // SAFETY: as above.
    unsafe { Bound::from_owned_ptr_or_opt(py, returned) }.ok_or(Raised)
}

/// Give a result to the interpreter.
#[inline(always)]
fn returned<'py>(body: impl FnOnce() -> Outcome<'py>) -> *mut ffi::PyObject {
    caught(body).map_or(ptr::null_mut(), Bound::into_ptr)
}

/// Turn a panic into an exception: it must not unwind into C.
#[inline(always)]
pub fn caught<T>(body: impl FnOnce() -> Result<T, Raised>) -> Result<T, Raised> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err(panicked()))
}

#[cold]
fn panicked() -> Raised {
    PanicException::new_err("ctxalchemy._native panicked; the reason is on stderr").into()
}
