//! `SessionStore`: the sessions of one context.

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyList, PyNone, PyTuple};

use crate::errors;
use crate::lookup;
use crate::python_function::{NewFunction, python_function};
use crate::raw::{Argument, Outcome, Raised, SessionStore};

/// The `NewFunction` of a method.  The Rust function is called with the `SessionStore` instead of `py`.
macro_rules! method {
    ($function:ident($($parameter:ident $(= $default:ident)?),*)) => {
        python_function!(
            @define true,
            [self $(, $parameter $(= $default)?)*],
            |_py, [this $(, $parameter)*]| $function(expect(&this)? $(, $parameter)*)
        )
    };
}

const METHODS: &[(&str, NewFunction)] = &[
    ("__init__", method!(init(manual = False, read_only = False))),
    ("raise_if_unusable", method!(raise_if_unusable())),
    ("get", method!(get(database))),
    ("put", method!(put(database, session))),
    ("pop", method!(pop(database))),
    ("items", method!(items())),
    ("clear", method!(clear())),
    ("close", method!(close())),
    ("__len__", method!(len())),
    ("__repr__", method!(repr())),
    ("__copy__", method!(copy())),
    ("__deepcopy__", method!(deep_copy(memo))),
    ("__reduce_ex__", method!(reduce(protocol))),
];

const PROPERTIES: &[(&str, NewFunction)] = &[
    ("manual", method!(manual())),
    ("read_only", method!(read_only())),
    ("closed", method!(closed())),
    ("token", method!(token())),
];

/// Create the class, with the docstrings and signatures of `reference`.
pub fn class<'py>(reference: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = reference.py();
    let class = SessionStore::install(py)?;
    for name in ["__doc__", "__final__", "__module__"] {
        class.setattr(name, reference.getattr(name)?)?;
    }
    for (name, new) in METHODS {
        class.setattr(*name, new(&reference.getattr(*name)?)?)?;
    }
    let property = py.import("builtins")?.getattr("property")?;
    for (name, new) in PROPERTIES {
        let getter = new(&reference.getattr(*name)?.getattr("fget")?)?;
        class.setattr(*name, property.call1((getter,))?)?;
    }
    Ok(class)
}

/// The argument as a `SessionStore`.
#[inline(always)]
pub fn expect<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Result<&'a Bound<'py, SessionStore>, Raised> {
    SessionStore::of(object).ok_or_else(|| of_another_type(object))
}

/// The repr of the object may contain a password.
#[cold]
fn of_another_type(object: &Bound<'_, PyAny>) -> Raised {
    match object.get_type().name() {
        Ok(name) => PyTypeError::new_err(format!("expected a SessionStore, got {name}")).into(),
        Err(error) => error.into(),
    }
}

fn init<'py>(
    store: &Bound<'py, SessionStore>,
    manual: Argument<'_, 'py>,
    read_only: Argument<'_, 'py>,
) -> Outcome<'py> {
    SessionStore::reinitialize(store, manual.is_truthy()?, read_only.is_truthy()?);
    Ok(store.py().None().into_bound(store.py()))
}

fn raise_if_unusable<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    if SessionStore::is_closed(store) {
        return Err(errors::closed_context(store.py()));
    }
    if !SessionStore::is_of_this_thread(store) {
        lookup::check_thread(store)?;
    }
    Ok(store.py().None().into_bound(store.py()))
}

fn get<'py>(store: &Bound<'py, SessionStore>, database: Argument<'_, 'py>) -> Outcome<'py> {
    Ok(SessionStore::get(store, database).into_bound_py_any(store.py())?)
}

fn put<'py>(store: &Bound<'py, SessionStore>, database: Argument<'_, 'py>, session: Argument<'_, 'py>) -> Outcome<'py> {
    if !SessionStore::put(store, database, session) {
        return Err(errors::closed_context(store.py()));
    }
    Ok(store.py().None().into_bound(store.py()))
}

fn pop<'py>(store: &Bound<'py, SessionStore>, database: Argument<'_, 'py>) -> Outcome<'py> {
    Ok(SessionStore::pop(store, database).into_bound_py_any(store.py())?)
}

fn items<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(PyList::new(store.py(), SessionStore::items(store))?.into_any())
}

fn clear<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(PyList::new(store.py(), SessionStore::clear(store))?.into_any())
}

fn close<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(PyList::new(store.py(), SessionStore::close(store))?.into_any())
}

fn len<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(SessionStore::len(store).into_bound_py_any(store.py())?)
}

fn repr<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    let state = if SessionStore::is_closed(store) { "closed" } else { "open" };
    let len = SessionStore::len(store);
    Ok(format!("<SessionStore {state}, sessions: {len}>").into_bound_py_any(store.py())?)
}

fn manual<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(PyBool::new(store.py(), SessionStore::is_manual(store)).to_owned().into_any())
}

fn read_only<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(PyBool::new(store.py(), SessionStore::is_read_only(store)).to_owned().into_any())
}

fn closed<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(PyBool::new(store.py(), SessionStore::is_closed(store)).to_owned().into_any())
}

fn token<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(SessionStore::token(store).into_bound_py_any(store.py())?)
}

fn copy<'py>(store: &Bound<'py, SessionStore>) -> Outcome<'py> {
    Ok(store.clone().into_any())
}

fn deep_copy<'py>(store: &Bound<'py, SessionStore>, _memo: Argument<'_, 'py>) -> Outcome<'py> {
    copy(store)
}

fn reduce<'py>(store: &Bound<'py, SessionStore>, _protocol: Argument<'_, 'py>) -> Outcome<'py> {
    let py = store.py();
    Ok((py.get_type::<PyNone>(), PyTuple::empty(py)).into_bound_py_any(py)?)
}
