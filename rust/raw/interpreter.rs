//! The interpreter that the module belongs to.

use std::sync::atomic::{AtomicI64, Ordering};

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Raise an error if a second interpreter of the process imports the module: the static variables belong to the first.
pub fn check_interpreter(_: Python<'_>) -> PyResult<()> {
    static FIRST: AtomicI64 = AtomicI64::new(-1);
    // SAFETY: the thread is attached, and so it has a current interpreter.
    let this = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    match FIRST.compare_exchange(-1, this, Ordering::Relaxed, Ordering::Relaxed) {
        Err(first) if first != this => {
            Err(PyImportError::new_err("ctxalchemy._native can be imported by only one interpreter of a process"))
        }
        _ => Ok(()),
    }
}
