//! The session of the current context, and `db_session_nowait`, which returns it.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::errors;
use crate::raw::{Argument, ContextVar, Lookup, Outcome, Raised, SessionStore, catch_panic};

/// The Python functions of `_create_session`.
struct CreateSession {
    create_session: Py<PyAny>,
    create_session_nowait: Py<PyAny>,
    in_event_loop: Py<PyAny>,
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
            in_event_loop: module.getattr("in_event_loop")?.unbind(),
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
    match SessionStore::lookup(store, connect) {
        Lookup::Session(session) => Ok(Found::Session(session)),
        Lookup::NoSession => Ok(Found::NoSession(current)),
        Lookup::NotOfThisThread => find_in_new_thread(current, connect),
    }
}

/// Look up the session if the context may be used in this thread.
#[cold]
#[inline(never)]
fn find_in_new_thread<'py>(current: Bound<'py, PyAny>, connect: Argument<'_, 'py>) -> Result<Found<'py>, Raised> {
    let py = current.py();
    let Some(store) = SessionStore::of(&current) else {
        return Err(errors::no_context(py));
    };
    // A closed context has no session, and creating one raises.
    if !SessionStore::is_closed(store) {
        check_thread(store)?;
    }
    Ok(match SessionStore::get(store, connect) {
        Some(session) => Found::Session(session),
        None => Found::NoSession(current),
    })
}

/// Raise if the context, which does not belong to this thread, belongs to the event loop of another thread.
///
/// A context that was opened without an event loop belongs to the first event loop that uses it.
#[cold]
pub fn check_thread(store: &Bound<'_, SessionStore>) -> Result<(), Raised> {
    let py = store.py();
    if SessionStore::has_thread(store) {
        return Err(errors::other_thread(py));
    }
    if in_event_loop(py)? {
        SessionStore::set_thread(store);
    }
    Ok(())
}

/// Whether an event loop is running in this thread.
pub fn in_event_loop(py: Python<'_>) -> Result<bool, Raised> {
    catch_panic(|| Ok(functions(py)?.in_event_loop.bind(py).call0()?.is_truthy()?))
}

/// The Python coroutine that creates the session of this database.
#[cold]
pub fn create_session<'py>(store: Bound<'py, PyAny>, connect: Argument<'_, 'py>) -> PyResult<Bound<'py, PyAny>> {
    let py = store.py();
    functions(py)?.create_session.bind(py).call1((store, connect))
}
