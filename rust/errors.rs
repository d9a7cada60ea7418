//! The exceptions that both backends raise.  The Python module `_errors` has their messages, and creates them.

use std::convert::Infallible;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::raw::{Raised, catch_panic};

/// The Python functions that create an exception.
struct Errors {
    no_context: Py<PyAny>,
    closed_context: Py<PyAny>,
    context_already_open: Py<PyAny>,
    other_thread: Py<PyAny>,
}

static ERRORS: PyOnceLock<Errors> = PyOnceLock::new();

pub fn install(py: Python<'_>) -> PyResult<()> {
    ERRORS.get_or_try_init(py, || {
        let errors = py.import("ctxalchemy._errors")?;
        PyResult::Ok(Errors {
            no_context: errors.getattr("no_context")?.unbind(),
            closed_context: errors.getattr("closed_context")?.unbind(),
            context_already_open: errors.getattr("context_already_open")?.unbind(),
            other_thread: errors.getattr("other_thread")?.unbind(),
        })
    })?;
    Ok(())
}

#[cold]
pub fn no_context(py: Python<'_>) -> Raised {
    raise(py, |errors| &errors.no_context)
}

#[cold]
pub fn closed_context(py: Python<'_>) -> Raised {
    raise(py, |errors| &errors.closed_context)
}

#[cold]
pub fn context_already_open(py: Python<'_>) -> Raised {
    raise(py, |errors| &errors.context_already_open)
}

#[cold]
pub fn other_thread(py: Python<'_>) -> Raised {
    raise(py, |errors| &errors.other_thread)
}

/// Raise the exception that this function creates.
fn raise(py: Python<'_>, function: fn(&Errors) -> &Py<PyAny>) -> Raised {
    let Err(raised) = catch_panic::<Infallible>(|| {
        let errors = ERRORS.get(py).expect("set when the module is imported");
        Err(PyErr::from_value(function(errors).bind(py).call0()?).into())
    });
    raised
}
