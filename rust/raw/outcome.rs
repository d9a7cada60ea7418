//! What is passed to a function of this crate, and what it returns.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use pyo3::Borrowed;
use pyo3::ffi;
use pyo3::panic::PanicException;
use pyo3::prelude::*;

/// An argument of a call.
pub type Argument<'a, 'py> = Borrowed<'a, 'py, PyAny>;

/// An object, or a raised exception.
pub type Outcome<'py, T = PyAny> = Result<Bound<'py, T>, Raised>;

/// An exception is set in the interpreter.
///
/// A `Result` with `Raised` is as wide as the value alone, and the compiler returns it in registers.  A `Result` with a
/// `PyErr` is returned through memory, which takes longer than a lookup.
pub struct Raised(());

impl Raised {
    /// A function of the interpreter has failed, and has set an exception.
    pub(super) const fn by_interpreter() -> Self {
        Self(())
    }
}

impl From<PyErr> for Raised {
    #[cold]
    fn from(error: PyErr) -> Self {
        Python::attach(|py| error.restore(py));
        Self(())
    }
}

/// The result of a function of the interpreter that returns a new reference, or null with an exception set.
///
/// # Safety
/// `result` comes from such a function.
#[inline(always)]
pub(super) unsafe fn outcome(py: Python<'_>, result: *mut ffi::PyObject) -> Outcome<'_> {
    // SAFETY: `result` is null or an owned reference, as the caller promises.
    unsafe { Bound::from_owned_ptr_or_opt(py, result) }.ok_or(Raised::by_interpreter())
}

/// Run the body of a function that the interpreter calls: return a new reference, or null with an exception set.
#[inline(always)]
pub(super) fn into_raw<'py>(body: impl FnOnce() -> Outcome<'py>) -> *mut ffi::PyObject {
    catch_panic(body).map_or(ptr::null_mut(), Bound::into_ptr)
}

/// Turn a panic into an exception.  A panic that reaches C code aborts the process.
#[inline(always)]
pub fn catch_panic<T>(body: impl FnOnce() -> Result<T, Raised>) -> Result<T, Raised> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err(panicked()))
}

#[cold]
fn panicked() -> Raised {
    PanicException::new_err("ctxalchemy._native panicked; the reason is on stderr").into()
}
