//! The session of the current context: `db_session` and `db_session_nowait`.

use std::ffi::CStr;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::raw::{self, Argument, Body, Coroutine, Outcome, Raised, Store, caught};
use crate::{errors, store};

/// What makes a session where there is none yet, in Python.
struct CreateSession {
    awaited: Py<PyAny>,
    nowait: Py<PyAny>,
}

static CREATE_SESSION: PyOnceLock<CreateSession> = PyOnceLock::new();

pub fn install(py: Python<'_>) -> PyResult<()> {
    CREATE_SESSION.get_or_try_init(py, || {
        let module = py.import("ctxalchemy._create_session")?;
        PyResult::Ok(CreateSession {
            awaited: module.getattr("create_session")?.unbind(),
            nowait: module.getattr("create_session_nowait")?.unbind(),
        })
    })?;
    Ok(())
}

pub struct DbSession;
impl Body<1> for DbSession {
    const PARAMETERS: [&'static CStr; 1] = [c"connect"];
    const GUARDED: bool = false;

    #[inline(always)]
    fn call<'py>(_: Python<'py>, [connect]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        Coroutine::object(connect)
    }
}

pub struct DbSessionNowait;
impl Body<1> for DbSessionNowait {
    const PARAMETERS: [&'static CStr; 1] = [c"connect"];
    const GUARDED: bool = false;

    #[inline(always)]
    fn call<'py>(py: Python<'py>, [connect]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        match find(py, connect)? {
            Found::Session(session) => Ok(session),
            Found::NotYetIn(store) => caught(|| Ok(create_session(py)?.nowait.bind(py).call1((store, connect))?)),
        }
    }
}

/// Where a lookup ends.
pub enum Found<'py> {
    Session(Bound<'py, PyAny>),
    /// There is none yet in this store.
    NotYetIn(Bound<'py, PyAny>),
}

/// Look up the session in the context of the current thread or task.
#[inline(always)]
pub fn find<'py>(py: Python<'py>, connect: Argument<'_, 'py>) -> Result<Found<'py>, Raised> {
    let current = raw::current(py)?;
    let Some(store) = Store::of(&current) else {
        return Err(errors::no_context(py));
    };
    match store::session(store, connect) {
        Some(session) => Ok(Found::Session(session)),
        None => Ok(Found::NotYetIn(current)),
    }
}

/// The Python coroutine that makes the session.
#[cold]
pub fn make<'py>(store: Bound<'py, PyAny>, connect: Argument<'_, 'py>) -> PyResult<Bound<'py, PyAny>> {
    let py = store.py();
    create_session(py)?.awaited.bind(py).call1((store, connect))
}

fn create_session(py: Python<'_>) -> PyResult<&CreateSession> {
    install(py)?;
    Ok(CREATE_SESSION.get(py).expect("just installed"))
}
