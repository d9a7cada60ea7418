//! The native backend: the context and its sessions, call for call as in `ctxalchemy._pure`.

mod context;
mod coroutine;
mod errors;
mod lookup;
#[allow(unsafe_code)]
mod raw;
mod slots;
mod store;

use pyo3::prelude::*;

/// What Python sees.  Each function looks like its twin of the same name, and has the body that is named here.
#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;
    use pyo3::sync::PyOnceLock;

    use crate::raw::{self, Body, function};
    use crate::{context, errors, lookup, store};

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

    fn names(twin: &Bound<'_, PyModule>) -> PyResult<Names> {
        let py = twin.py();
        errors::install(py)?;
        lookup::install(py)?;
        raw::install(py)?;
        Ok(vec![
            ("SessionStore", store::class(&twin.getattr("SessionStore")?)?.unbind()),
            ("current_context", raw::current_function(py)?.unbind()),
            named::<1, context::OpenContext>(twin, "open_context")?,
            named::<1, context::ResetContext>(twin, "reset_context")?,
            named::<1, context::Init>(twin, "init_db_session_ctx")?,
            named::<0, context::IsInitiated>(twin, "is_context_initiated")?,
            named::<1, lookup::DbSession>(twin, "db_session")?,
            named::<1, lookup::DbSessionNowait>(twin, "db_session_nowait")?,
        ])
    }

    fn named<const N: usize, B: Body<N>>(
        twin: &Bound<'_, PyModule>,
        name: &'static str,
    ) -> PyResult<(&'static str, Py<PyAny>)> {
        Ok((name, function::<N, B>(&twin.getattr(name)?)?.unbind()))
    }
}
