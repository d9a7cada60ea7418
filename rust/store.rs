//! `SessionStore`: the sessions of one context.

use std::ffi::CStr;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyList};

use crate::errors;
use crate::raw::{Argument, Body, Object, Outcome, Raised, Store, function};
use crate::slots::Slots;

/// Make the class, like its twin.
pub fn class<'py>(twin: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let class = Store::install(twin.py())?;
    for name in ["__doc__", "__final__"] {
        class.setattr(name, twin.getattr(name)?)?;
    }
    for (name, method) in [
        ("__init__", function::<2, Init>(&twin.getattr("__init__")?)?),
        ("get", function::<2, Get>(&twin.getattr("get")?)?),
        ("put", function::<3, Put>(&twin.getattr("put")?)?),
        ("pop", function::<2, Pop>(&twin.getattr("pop")?)?),
        ("items", function::<1, Items>(&twin.getattr("items")?)?),
        ("clear", function::<1, Clear>(&twin.getattr("clear")?)?),
        ("close", function::<1, Close>(&twin.getattr("close")?)?),
        ("__len__", function::<1, Len>(&twin.getattr("__len__")?)?),
        ("__repr__", function::<1, Repr>(&twin.getattr("__repr__")?)?),
    ] {
        class.setattr(name, method)?;
    }
    let property = twin.py().import("builtins")?.getattr("property")?;
    for (name, getter) in [
        ("manual", function::<1, Manual>(&twin.getattr("manual")?.getattr("fget")?)?),
        ("closed", function::<1, Closed>(&twin.getattr("closed")?.getattr("fget")?)?),
        ("token", function::<1, Token>(&twin.getattr("token")?.getattr("fget")?)?),
    ] {
        class.setattr(name, property.call1((getter,))?)?;
    }
    Ok(class)
}

/// The argument as a store.
#[inline(always)]
pub fn expect<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Result<&'a Bound<'py, Store>, Raised> {
    Store::of(object).ok_or_else(|| PyTypeError::new_err(format!("expected a SessionStore, got {object:?}")).into())
}

/// The session of this connection.
#[inline(always)]
pub fn session<'py>(store: &Bound<'py, Store>, connection: Argument<'_, 'py>) -> Option<Bound<'py, PyAny>> {
    let py = store.py();
    Store::with(store, |inside| {
        let session = inside.sessions.get(|key| key.is(connection))?;
        Some(session.to_bound(py))
    })
}

pub fn is_closed(store: &Bound<'_, Store>) -> bool {
    Store::with(store, |inside| inside.closed)
}

fn boolean(py: Python<'_>, value: bool) -> Bound<'_, PyAny> {
    PyBool::new(py, value).to_owned().into_any()
}

fn pairs<'py>(py: Python<'py>, sessions: Slots<Object>) -> Outcome<'py> {
    let pairs: Vec<_> = sessions.iter().map(|(key, session)| (key.to_bound(py), session.to_bound(py))).collect();
    Ok(PyList::new(py, pairs)?.into_any())
}

struct Init;
impl Body<2> for Init {
    const PARAMETERS: [&'static CStr; 2] = [c"self", c"manual"];
    const REQUIRED: usize = 1;

    fn call<'py>(py: Python<'py>, [this, manual]: [Argument<'_, 'py>; 2]) -> Outcome<'py> {
        let manual = manual.is_truthy()?;
        let old = Store::with(expect(&this)?, |inside| {
            inside.manual = manual;
            inside.closed = false;
            (inside.sessions.take(), inside.token.take())
        });
        drop(old);
        Ok(py.None().into_bound(py))
    }
}

struct Manual;
impl Body<1> for Manual {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        Ok(boolean(py, Store::with(expect(&this)?, |inside| inside.manual)))
    }
}

struct Closed;
impl Body<1> for Closed {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        Ok(boolean(py, is_closed(expect(&this)?)))
    }
}

struct Token;
impl Body<1> for Token {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        let token = Store::with(expect(&this)?, |inside| inside.token.as_ref().map(|token| token.to_bound(py)));
        Ok(token.into_bound_py_any(py)?)
    }
}

struct Get;
impl Body<2> for Get {
    const PARAMETERS: [&'static CStr; 2] = [c"self", c"connection"];

    fn call<'py>(py: Python<'py>, [this, connection]: [Argument<'_, 'py>; 2]) -> Outcome<'py> {
        Ok(session(expect(&this)?, connection).into_bound_py_any(py)?)
    }
}

struct Put;
impl Body<3> for Put {
    const PARAMETERS: [&'static CStr; 3] = [c"self", c"connection", c"session"];

    fn call<'py>(py: Python<'py>, [this, connection, session]: [Argument<'_, 'py>; 3]) -> Outcome<'py> {
        let pair = (connection.to_owned().into(), session.to_owned().into());
        let unused = Store::with(expect(&this)?, |inside| {
            if inside.closed {
                return Err(pair);
            }
            Ok(inside.sessions.put(pair.0, pair.1, |key| key.is(connection)))
        });
        if unused.is_err() {
            return Err(errors::closed_context(py));
        }
        Ok(py.None().into_bound(py))
    }
}

struct Pop;
impl Body<2> for Pop {
    const PARAMETERS: [&'static CStr; 2] = [c"self", c"connection"];

    fn call<'py>(py: Python<'py>, [this, connection]: [Argument<'_, 'py>; 2]) -> Outcome<'py> {
        let pair = Store::with(expect(&this)?, |inside| inside.sessions.pop(|key| key.is(connection)));
        Ok(pair.map(|(_key, session)| session.to_bound(py)).into_bound_py_any(py)?)
    }
}

struct Items;
impl Body<1> for Items {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        // A copy first: making the list may run Python code, which may change the store.
        pairs(py, Store::with(expect(&this)?, |inside| inside.sessions.clone()))
    }
}

struct Clear;
impl Body<1> for Clear {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        pairs(py, Store::with(expect(&this)?, |inside| inside.sessions.take()))
    }
}

struct Close;
impl Body<1> for Close {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        let sessions = Store::with(expect(&this)?, |inside| {
            inside.closed = true;
            inside.sessions.take()
        });
        pairs(py, sessions)
    }
}

struct Len;
impl Body<1> for Len {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        Ok(Store::with(expect(&this)?, |inside| inside.sessions.len()).into_bound_py_any(py)?)
    }
}

struct Repr;
impl Body<1> for Repr {
    const PARAMETERS: [&'static CStr; 1] = [c"self"];

    fn call<'py>(py: Python<'py>, [this]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        let (closed, len) = Store::with(expect(&this)?, |inside| (inside.closed, inside.sessions.len()));
        let state = if closed { "closed" } else { "open" };
        Ok(format!("<SessionStore {state}, sessions: {len}>").into_bound_py_any(py)?)
    }
}
