//! The context variable that contains the current context.

use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;

use super::immortal::Immortal;
use super::outcome::{Outcome, Raised, outcome};
use super::session_store::SessionStore;

static VARIABLE: Immortal = Immortal::new();

/// The context variable.
pub struct ContextVar;

impl ContextVar {
    /// Create the variable.
    pub fn install(py: Python<'_>) -> PyResult<()> {
        // SAFETY: the name is a C string, and the default is an object.  The variable is new.
        unsafe {
            let variable = ffi::PyContextVar_New(c"ctxalchemy".as_ptr(), ffi::Py_None());
            VARIABLE.set(Bound::from_owned_ptr_or_err(py, variable)?);
        }
        Ok(())
    }

    /// The Python function that returns the value of the variable.
    pub fn get_function(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        let Ok(variable) = VARIABLE.get() else {
            return Err(PyErr::fetch(py));
        };
        // SAFETY: the variable is an object that lives as long as the process.
        unsafe { Bound::from_borrowed_ptr(py, variable.as_ptr()) }.getattr("get")
    }

    /// The value of the variable: a `SessionStore` or None, unless other code has set the variable, which every token
    /// makes accessible.
    #[inline(always)]
    pub fn get(py: Python<'_>) -> Outcome<'_> {
        let variable = VARIABLE.get()?;
        let mut value = ptr::null_mut();
        // SAFETY: `variable` is a context variable.  It has a default, so that the value is null only after an error.
        unsafe {
            ffi::PyContextVar_Get(variable.as_ptr(), ptr::null_mut(), &mut value);
            outcome(py, value)
        }
    }

    /// Set the variable, and return the token to reset it with.
    #[inline(always)]
    pub fn set<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
        let variable = VARIABLE.get()?;
        // SAFETY: `variable` is a context variable, and `store` is an object.
        unsafe { outcome(store.py(), ffi::PyContextVar_Set(variable.as_ptr(), store.as_ptr())) }
    }

    /// Reset the variable.
    #[inline(always)]
    pub fn reset(token: &Bound<'_, PyAny>) -> Result<(), Raised> {
        let variable = VARIABLE.get()?;
        // SAFETY: `variable` is a context variable.  The interpreter raises an error if `token` is not a token of it.
        if unsafe { ffi::PyContextVar_Reset(variable.as_ptr(), token.as_ptr()) } < 0 {
            return Err(Raised::by_interpreter());
        }
        Ok(())
    }
}
