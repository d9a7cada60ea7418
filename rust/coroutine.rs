//! How the coroutine of `db_session()` runs: as that of the `async def` in `ctxalchemy._pure` does.

use pyo3::exceptions::{PyGeneratorExit, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyNone, PyTuple, PyType};
use pyo3::{IntoPyObjectExt, intern};

use crate::lookup::{self, Found};
use crate::raw::{Coroutine, Raised, Sent, State, caught};

/// Run it from where it is to where it waits, or to its end.
///
/// Called without a guard against panics, which costs a tenth of it: only the cold paths have one.
#[inline(always)]
pub fn send<'py>(coroutine: &Coroutine, value: &Bound<'py, PyAny>) -> Result<Sent<'py>, Raised> {
    let py = value.py();
    if !value.is_none() || !coroutine.claim(State::New) {
        return caught(|| Ok(resume(coroutine, value)?));
    }
    match lookup::find(py, coroutine.connect(py)) {
        Ok(Found::Session(session)) => {
            coroutine.release(State::Done);
            Ok(Sent::Returned(session))
        }
        Ok(Found::NotYetIn(store)) => caught(|| Ok(begin(coroutine, store)?)),
        Err(Raised) => {
            coroutine.release(State::Done);
            Err(Raised)
        }
    }
}

/// Begin to wait for `create_session`.  The state is `Running`.
#[cold]
fn begin<'py>(coroutine: &Coroutine, store: Bound<'py, PyAny>) -> PyResult<Sent<'py>> {
    let py = store.py();
    match lookup::make(store, coroutine.connect(py)) {
        Ok(inner) => {
            coroutine.set_inner(&inner);
            run(coroutine, &inner, PyNone::get(py).as_any())
        }
        Err(error) => {
            coroutine.release(State::Done);
            Err(error)
        }
    }
}

#[cold]
fn resume<'py>(coroutine: &Coroutine, value: &Bound<'py, PyAny>) -> PyResult<Sent<'py>> {
    match claim_suspended(coroutine, value.py())? {
        Some(inner) => run(coroutine, &inner, value),
        None => Err(PyTypeError::new_err("can't send non-None value to a just-started coroutine")),
    }
}

/// Send into `create_session`.  The state is `Running`.
fn run<'py>(coroutine: &Coroutine, inner: &Bound<'py, PyAny>, value: &Bound<'py, PyAny>) -> PyResult<Sent<'py>> {
    let sent = Coroutine::send_inner(inner, value);
    coroutine.release(if matches!(sent, Ok(Sent::Yielded(_))) { State::Suspended } else { State::Done });
    sent
}

/// Raise an exception inside it.
pub fn throw<'py>(coroutine: &Coroutine, arguments: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
    let py = arguments.py();
    if coroutine.claim(State::New) {
        // Nothing has run, so that the twin's coroutine can stand in: it fails with the exception at
        // its first line, or says what is wrong with the arguments and is as it was.
        let twin = unstarted_twin(py, coroutine)?;
        let thrown = twin.call_method1(intern!(py, "throw"), arguments);
        let failed = twin.getattr(intern!(py, "cr_frame"))?.is_none();
        twin.call_method0(intern!(py, "close"))?;
        coroutine.release(if failed { State::Done } else { State::New });
        return thrown;
    }
    let Some(inner) = claim_suspended(coroutine, py)? else {
        return Err(executing());
    };
    let thrown = if is_generator_exit(arguments) {
        // What is waited for is closed first, and the exception raised whatever came of that.
        let closed = inner.call_method0(intern!(py, "close"));
        closed.and_then(|_| unstarted_twin(py, coroutine)?.call_method1(intern!(py, "throw"), arguments))
    } else {
        inner.call_method1(intern!(py, "throw"), arguments)
    };
    coroutine.release(if thrown.is_ok() { State::Suspended } else { State::Done });
    thrown
}

fn is_generator_exit(arguments: &Bound<'_, PyTuple>) -> bool {
    let class = arguments.py().get_type::<PyGeneratorExit>();
    arguments.get_item(0).is_ok_and(|thrown| match thrown.cast::<PyType>() {
        Ok(thrown) => thrown.is_subclass(&class).unwrap_or(false),
        Err(_) => thrown.is_instance(&class).unwrap_or(false),
    })
}

/// Raise GeneratorExit inside it.
pub fn close<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    if coroutine.claim(State::New) {
        coroutine.release(State::Done);
    } else if coroutine.state() != State::Done
        && let Some(inner) = claim_suspended(coroutine, py)?
    {
        let closed = inner.call_method0(intern!(py, "close"));
        // It may go on where it refuses to: `create_session` knows.
        coroutine.release(if closed.is_ok() { State::Done } else { State::Suspended });
        closed?;
    }
    Ok(py.None().into_bound(py))
}

/// Set the state from `Suspended` to `Running`, and return what is waited for.  None: it is new.
fn claim_suspended<'py>(coroutine: &Coroutine, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
    if coroutine.claim(State::Suspended)
        && let Some(inner) = coroutine.inner(py)
    {
        return Ok(Some(inner));
    }
    match coroutine.state() {
        State::New => Ok(None),
        State::Done => Err(PyRuntimeError::new_err("cannot reuse already awaited coroutine")),
        State::Running | State::Suspended => Err(executing()),
    }
}

fn executing() -> PyErr {
    PyValueError::new_err("coroutine already executing")
}

/// What an `await` gets to hear while another one waits.
pub fn awaited_already() -> PyErr {
    PyRuntimeError::new_err("coroutine is being awaited already")
}

pub fn name<'py>(py: Python<'py>, _: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    Ok(intern!(py, "db_session").clone().into_any())
}

/// `__class__`: `inspect.iscoroutine` and `isinstance(..., types.CoroutineType)` say yes.
pub fn class<'py>(py: Python<'py>, _: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Ok(CLASS.import(py, "types", "CoroutineType")?.clone())
}

pub fn is_running<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    (coroutine.state() == State::Running).into_bound_py_any(py)
}

pub fn is_suspended<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    (coroutine.state() == State::Suspended).into_bound_py_any(py)
}

/// `cr_state`, which `inspect` looks at from 3.15 on.
pub fn state<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    let state = match coroutine.state() {
        State::New => intern!(py, "CORO_CREATED"),
        State::Running => intern!(py, "CORO_RUNNING"),
        State::Suspended => intern!(py, "CORO_SUSPENDED"),
        State::Done => intern!(py, "CORO_CLOSED"),
    };
    Ok(state.clone().into_any())
}

pub fn awaited<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    let suspended = coroutine.state() == State::Suspended;
    suspended.then(|| coroutine.inner(py)).flatten().into_bound_py_any(py)
}

/// It has no frame of its own: before the first step a fresh one, then the one that waits.
pub fn frame<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    if coroutine.state() == State::New {
        let twin = unstarted_twin(py, coroutine)?;
        let frame = twin.getattr(intern!(py, "cr_frame"));
        twin.call_method0(intern!(py, "close"))?;
        return frame;
    }
    let inner = coroutine.inner(py).filter(|_| coroutine.state() != State::Done);
    inner.map_or_else(|| Ok(py.None().into_bound(py)), |inner| inner.getattr(intern!(py, "cr_frame")))
}

pub fn code<'py>(py: Python<'py>, _: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    twin(py)?.getattr(intern!(py, "__code__"))
}

/// Where it was made is not tracked.
pub fn origin<'py>(py: Python<'py>, _: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    Ok(py.None().into_bound(py))
}

fn unstarted_twin<'py>(py: Python<'py>, coroutine: &Coroutine) -> PyResult<Bound<'py, PyAny>> {
    twin(py)?.call1((coroutine.connect(py),))
}

/// The `async def`.
fn twin(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static TWIN: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    TWIN.import(py, "ctxalchemy._pure", "db_session")
}
