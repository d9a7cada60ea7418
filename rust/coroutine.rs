//! `db_session`, and what its coroutine does: the same as the coroutine of the `async def` in `ctxalchemy._pure`.

use std::ffi::CStr;

use pyo3::exceptions::{PyGeneratorExit, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyNone, PyTuple, PyType};
use pyo3::{IntoPyObjectExt, intern};

use crate::lookup::{self, Found};
use crate::raw::{Argument, Attribute, Coroutine, CoroutineBody, Outcome, Raised, Running, SendResult, Started, State};

pub fn install(py: Python<'_>) -> PyResult<()> {
    Coroutine::install::<DbSession>(py)
}

#[inline(always)]
pub fn db_session<'py>(_: Python<'py>, connect: Argument<'_, 'py>) -> Outcome<'py> {
    Coroutine::create(connect)
}

/// The body of the coroutine.
struct DbSession;

impl CoroutineBody for DbSession {
    const ATTRIBUTES: &'static [(&'static CStr, Attribute)] = &[
        (c"__name__", name),
        (c"__qualname__", name),
        (c"__class__", class),
        (c"cr_running", cr_running),
        (c"cr_suspended", cr_suspended),
        (c"cr_state", cr_state),
        (c"cr_await", cr_await),
        (c"cr_frame", cr_frame),
        (c"cr_code", cr_code),
        (c"cr_origin", cr_origin),
    ];

    /// No panic is converted into an exception here, because the conversion takes a tenth of the time of this function.
    #[inline(always)]
    fn start<'a, 'py>(running: Running<'a, 'py>) -> Started<'a, 'py> {
        let coroutine = running.coroutine();
        match lookup::find(coroutine.py(), Coroutine::connect(coroutine)) {
            Ok(Found::Session(session)) => Started::Returned(running.return_value(session)),
            Ok(Found::NoSession(store)) => Started::MustWait(running, store),
            Err(raised) => Started::Raised(raised),
        }
    }

    /// Wait for `create_session`.
    fn wait<'a, 'py>(running: Running<'a, 'py>, store: Bound<'py, PyAny>) -> Result<SendResult<'a, 'py>, Raised> {
        let coroutine = running.coroutine();
        let awaited = lookup::create_session(store, Coroutine::connect(coroutine))?;
        running.set_awaited(awaited.clone());
        running.send(&awaited, PyNone::get(coroutine.py()).as_any())
    }

    fn resume<'a, 'py>(
        coroutine: &'a Bound<'py, Coroutine>,
        value: &Bound<'py, PyAny>,
    ) -> Result<SendResult<'a, 'py>, Raised> {
        match run_suspended(coroutine)? {
            Some((running, awaited)) => running.send(&awaited, value),
            None => Err(PyTypeError::new_err("can't send non-None value to a just-started coroutine").into()),
        }
    }

    fn throw<'py>(coroutine: &Bound<'py, Coroutine>, arguments: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        let py = coroutine.py();
        if let Some(running) = Coroutine::start(coroutine) {
            // A new coroutine of the reference implementation replaces this one, which has not run yet.  The other
            // coroutine fails with the exception at its first line.  If the arguments are wrong, it raises an error and
            // remains new.
            let other = new_reference_coroutine(coroutine)?;
            let thrown = other.call_method1(intern!(py, "throw"), arguments);
            let is_done = other.getattr(intern!(py, "cr_frame"))?.is_none();
            other.call_method0(intern!(py, "close"))?;
            if !is_done {
                running.undo_start();
            }
            return thrown;
        }
        let Some((running, awaited)) = run_suspended(coroutine)? else {
            return Err(already_executing());
        };
        let thrown = if is_generator_exit(arguments) {
            // The awaited coroutine is closed first.  Then the exception is raised, unless closing raised another one.
            let closed = awaited.call_method0(intern!(py, "close"));
            closed.and_then(|_| new_reference_coroutine(coroutine)?.call_method1(intern!(py, "throw"), arguments))
        } else {
            awaited.call_method1(intern!(py, "throw"), arguments)
        };
        if thrown.is_ok() {
            running.suspend();
        }
        thrown
    }

    fn close(coroutine: &Bound<'_, Coroutine>) -> PyResult<()> {
        let py = coroutine.py();
        if let Some(running) = Coroutine::start(coroutine) {
            drop(running);
        } else if Coroutine::state(coroutine) != State::Done
            && let Some((running, awaited)) = run_suspended(coroutine)?
        {
            let closed = awaited.call_method0(intern!(py, "close"));
            if closed.is_err() {
                // `create_session` may have caught the exception, and may wait again.
                running.suspend();
            }
            closed?;
        }
        Ok(())
    }
}

/// A suspended coroutine, and what it waits for.
type Suspended<'a, 'py> = (Running<'a, 'py>, Bound<'py, PyAny>);

/// Run the coroutine if it is suspended.  The result is None if the coroutine is new.
fn run_suspended<'a, 'py>(coroutine: &'a Bound<'py, Coroutine>) -> PyResult<Option<Suspended<'a, 'py>>> {
    if let Some(running) = Coroutine::resume(coroutine)
        && let Some(awaited) = Coroutine::awaited(coroutine)
    {
        return Ok(Some((running, awaited)));
    }
    match Coroutine::state(coroutine) {
        State::New => Ok(None),
        State::Done => Err(PyRuntimeError::new_err("cannot reuse already awaited coroutine")),
        State::Running | State::Suspended => Err(already_executing()),
    }
}

fn already_executing() -> PyErr {
    PyValueError::new_err("coroutine already executing")
}

/// Whether the arguments of `throw()` are those for a GeneratorExit.
fn is_generator_exit(arguments: &Bound<'_, PyTuple>) -> bool {
    let class = arguments.py().get_type::<PyGeneratorExit>();
    arguments.get_item(0).is_ok_and(|thrown| match thrown.cast::<PyType>() {
        Ok(thrown) => thrown.is_subclass(&class).unwrap_or(false),
        Err(_) => thrown.is_instance(&class).unwrap_or(false),
    })
}

fn name<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    Ok(intern!(coroutine.py(), "db_session").clone().into_any())
}

/// Makes `inspect.iscoroutine` and `isinstance(..., types.CoroutineType)` return True.
fn class<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Ok(CLASS.import(coroutine.py(), "types", "CoroutineType")?.clone())
}

fn cr_running<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    (Coroutine::state(coroutine) == State::Running).into_bound_py_any(coroutine.py())
}

fn cr_suspended<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    (Coroutine::state(coroutine) == State::Suspended).into_bound_py_any(coroutine.py())
}

/// Since CPython 3.15, `inspect` reads this attribute.
fn cr_state<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    let py = coroutine.py();
    let state = match Coroutine::state(coroutine) {
        State::New => intern!(py, "CORO_CREATED"),
        State::Running => intern!(py, "CORO_RUNNING"),
        State::Suspended => intern!(py, "CORO_SUSPENDED"),
        State::Done => intern!(py, "CORO_CLOSED"),
    };
    Ok(state.clone().into_any())
}

fn cr_await<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    let suspended = Coroutine::state(coroutine) == State::Suspended;
    suspended.then(|| Coroutine::awaited(coroutine)).flatten().into_bound_py_any(coroutine.py())
}

/// The coroutine has no frame.  The value is the frame of a new coroutine of the reference implementation, and after
/// the start the frame of the awaited coroutine.
fn cr_frame<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    let py = coroutine.py();
    if Coroutine::state(coroutine) == State::New {
        let other = new_reference_coroutine(coroutine)?;
        let frame = other.getattr(intern!(py, "cr_frame"));
        other.call_method0(intern!(py, "close"))?;
        return frame;
    }
    match Coroutine::awaited(coroutine) {
        Some(awaited) if Coroutine::state(coroutine) != State::Done => awaited.getattr(intern!(py, "cr_frame")),
        _ => Ok(py.None().into_bound(py)),
    }
}

fn cr_code<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    reference(coroutine.py())?.getattr(intern!(coroutine.py(), "__code__"))
}

/// The traceback of the creation of the coroutine, which is not recorded.
fn cr_origin<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    Ok(coroutine.py().None().into_bound(coroutine.py()))
}

/// A new coroutine of the reference implementation, for the same database.
fn new_reference_coroutine<'py>(coroutine: &Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>> {
    reference(coroutine.py())?.call1((Coroutine::connect(coroutine),))
}

/// The `async def` of the reference implementation.
fn reference(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static REFERENCE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    REFERENCE.import(py, "ctxalchemy._pure", "db_session")
}
