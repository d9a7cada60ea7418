//! The session of the current context, and `db_session_nowait`, which returns it.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::errors;
use crate::raw::{Argument, ContextVar, Outcome, Raised, SessionStore, catch_panic};

/// The Python functions that create a session.
struct CreateSession {
    create_session: Py<PyAny>,
    create_session_nowait: Py<PyAny>,
}

static CREATE_SESSION: PyOnceLock<CreateSession> = PyOnceLock::new();

pub fn install(py: Python<'_>) -> PyResult<()> {
    functions(py)?;
    Ok(())
}

fn functions(py: Python<'_>) -> PyResult<&CreateSession> {
    CREATE_SESSION.get_or_try_init(py, || {
        let module = py.import("ctxalchemy._create_session")?;
        Ok(CreateSession {
            create_session: module.getattr("create_session")?.unbind(),
            create_session_nowait: module.getattr("create_session_nowait")?.unbind(),
        })
    })
}

#[inline(always)]
pub fn db_session_nowait<'py>(py: Python<'py>, connect: Argument<'_, 'py>) -> Outcome<'py> {
    match find(py, connect)? {
        Found::Session(session) => Ok(session),
        Found::NoSession(store) => catch_panic(|| {
            let create_session_nowait = functions(py)?.create_session_nowait.bind(py);
            Ok(create_session_nowait.call1((store, connect))?)
        }),
    }
}

/// The result of a lookup.
pub enum Found<'py> {
    Session(Bound<'py, PyAny>),
    /// This context has no session of the database yet.
    NoSession(Bound<'py, PyAny>),
}

/// Look up the session of this database in the current context.
#[inline(always)]
pub fn find<'py>(py: Python<'py>, connect: Argument<'_, 'py>) -> Result<Found<'py>, Raised> {
    let current = ContextVar::get(py)?;
    let Some(store) = SessionStore::of(&current) else {
        return Err(errors::no_context(py));
    };
    match SessionStore::get(store, connect) {
        Some(session) => Ok(Found::Session(session)),
        None => Ok(Found::NoSession(current)),
    }
}

/// The Python coroutine that creates the session of this database.
#[cold]
pub fn create_session<'py>(store: Bound<'py, PyAny>, connect: Argument<'_, 'py>) -> PyResult<Bound<'py, PyAny>> {
    let py = store.py();
    functions(py)?.create_session.bind(py).call1((store, connect))
}
