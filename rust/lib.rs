//! The native backend.  It has the names and the behaviour of the reference implementation, `ctxalchemy._pure`.

mod context;
mod coroutine;
mod errors;
mod lookup;
mod python_function;
#[allow(unsafe_code)]
mod raw;
mod session_store;
mod slots;

use pyo3::prelude::*;

/// The module that Python imports.
#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;
    use pyo3::sync::PyOnceLock;

    use crate::context::{init_db_session_ctx, is_context_initiated, open_context, reset_context};
    use crate::coroutine::{self, db_session};
    use crate::lookup::{self, db_session_nowait};
    use crate::python_function::{NewFunction, python_function};
    use crate::raw::{self, ContextVar};
    use crate::{errors, session_store};

    /// The functions, and their parameters besides `py`.
    const FUNCTIONS: &[(&str, NewFunction)] = &[
        ("open_context", python_function!(unguarded open_context(manual = False, read_only = False))),
        ("reset_context", python_function!(unguarded reset_context(store))),
        ("init_db_session_ctx", python_function!(init_db_session_ctx(force = False))),
        ("is_context_initiated", python_function!(unguarded is_context_initiated())),
        ("db_session", python_function!(unguarded db_session(connect))),
        ("db_session_nowait", python_function!(unguarded db_session_nowait(connect))),
    ];

    type Names = Vec<(&'static str, Py<PyAny>)>;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        static NAMES: PyOnceLock<Names> = PyOnceLock::new();
        let py = module.py();
        raw::check_interpreter(py)?;
        for (name, object) in NAMES.get_or_try_init(py, || names(&py.import("ctxalchemy._pure")?))? {
            module.add(*name, object)?;
        }
        Ok(())
    }

    /// The names of the module, and their values.
    fn names(reference: &Bound<'_, PyModule>) -> PyResult<Names> {
        let py = reference.py();
        errors::install(py)?;
        lookup::install(py)?;
        coroutine::install(py)?;
        ContextVar::install(py)?;
        let mut names = vec![
            ("SessionStore", session_store::class(&reference.getattr("SessionStore")?)?.unbind()),
            ("current_context", ContextVar::get_function(py)?.unbind()),
        ];
        for (name, new) in FUNCTIONS {
            names.push((name, new(&reference.getattr(*name)?)?.unbind()));
        }
        Ok(names)
    }
}
