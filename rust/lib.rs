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

#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;
    use pyo3::sync::PyOnceLock;

    use crate::{
        context, errors, lookup,
        raw::{Coroutine, function, install_var},
        store,
    };

    static NAMES: PyOnceLock<Vec<(&str, Py<PyAny>)>> = PyOnceLock::new();

    /// What Python sees.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        let names = NAMES.get_or_try_init(py, || {
            let twin = py.import("ctxalchemy._pure")?;
            errors::install(py)?;
            install_var(py)?;
            lookup::install(py)?;
            Coroutine::install(py)?;
            PyResult::Ok(vec![
                ("SessionStore", store::class(&twin.getattr("SessionStore")?)?.unbind()),
                ("current", function::<0, context::Current>(&twin.getattr("current")?)?.unbind()),
                ("enter", function::<1, context::Enter>(&twin.getattr("enter")?)?.unbind()),
                ("leave", function::<1, context::Leave>(&twin.getattr("leave")?)?.unbind()),
                ("init_db_session_ctx", function::<1, context::Init>(&twin.getattr("init_db_session_ctx")?)?.unbind()),
                (
                    "is_context_initiated",
                    function::<0, context::IsInitiated>(&twin.getattr("is_context_initiated")?)?.unbind(),
                ),
                ("db_session", function::<1, lookup::DbSession>(&twin.getattr("db_session")?)?.unbind()),
                (
                    "db_session_nowait",
                    function::<1, lookup::DbSessionNowait>(&twin.getattr("db_session_nowait")?)?.unbind(),
                ),
            ])
        })?;
        for (name, object) in names {
            module.add(*name, object)?;
        }
        Ok(())
    }
}
