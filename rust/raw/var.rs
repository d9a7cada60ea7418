//! The context variable that holds the current context.

use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;

use super::{Immortal, Outcome, Raised, Store, outcome};

static VAR: Immortal = Immortal::new();

/// Make the variable.
pub fn install(py: Python<'_>) -> PyResult<()> {
    // SAFETY: the name is a C string, and None the default.
    VAR.set(unsafe {
        Bound::from_owned_ptr_or_err(py, ffi::PyContextVar_New(c"ctxalchemy".as_ptr(), ffi::Py_None()))?
    });
    Ok(())
}

/// A function that returns the value of the variable.
pub fn current_function(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: the variable is an object.
    unsafe { Bound::from_borrowed_ptr(py, VAR.get()) }.getattr("get")
}

/// The value of the variable: a `Store` or None, unless someone dug it out of a token and set it.
#[inline(always)]
pub fn current(py: Python<'_>) -> Outcome<'_> {
    let mut value = ptr::null_mut();
    // SAFETY: the variable is one.  It has a default: the value is null only where there is an error.
    unsafe {
        ffi::PyContextVar_Get(VAR.get(), ptr::null_mut(), &mut value);
        outcome(py, value)
    }
}

/// Set the variable, and return the token to reset it with.
#[inline(always)]
pub fn set<'py>(store: &Bound<'py, Store>) -> Outcome<'py> {
    // SAFETY: the variable is one, the store is an object.
    unsafe { outcome(store.py(), ffi::PyContextVar_Set(VAR.get(), store.as_ptr())) }
}

/// Reset the variable.
#[inline(always)]
pub fn reset(token: &Bound<'_, PyAny>) -> Result<(), Raised> {
    // SAFETY: the variable is one; what is no token of it is refused with an exception.
    if unsafe { ffi::PyContextVar_Reset(VAR.get(), token.as_ptr()) } < 0 {
        return Err(Raised);
    }
    Ok(())
}
