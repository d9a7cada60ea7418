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
    for name in ["__doc__", "__final__", "__module__"] {
        class.setattr(name, twin.getattr(name)?)?;
    }
    set::<2, Init>(&class, twin, "__init__")?;
    set::<2, Get>(&class, twin, "get")?;
    set::<3, Put>(&class, twin, "put")?;
    set::<2, Pop>(&class, twin, "pop")?;
    set::<1, Items>(&class, twin, "items")?;
    set::<1, Clear>(&class, twin, "clear")?;
    set::<1, Close>(&class, twin, "close")?;
    set::<1, Len>(&class, twin, "__len__")?;
    set::<1, Repr>(&class, twin, "__repr__")?;
    set_property::<Manual>(&class, twin, "manual")?;
    set_property::<Closed>(&class, twin, "closed")?;
    set_property::<Token>(&class, twin, "token")?;
    Ok(class)
}

fn set<const N: usize, B: Body<N>>(class: &Bound<'_, PyAny>, twin: &Bound<'_, PyAny>, name: &str) -> PyResult<()> {
    class.setattr(name, function::<N, B>(&twin.getattr(name)?)?)
}

fn set_property<B: Body<1>>(class: &Bound<'_, PyAny>, twin: &Bound<'_, PyAny>, name: &str) -> PyResult<()> {
    let property = class.py().import("builtins")?.getattr("property")?;
    class.setattr(name, property.call1((function::<1, B>(&twin.getattr(name)?.getattr("fget")?)?,))?)
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
    const PARAMETERS: [&'static CStr; 2] = [c"self", c"database"];

    fn call<'py>(py: Python<'py>, [this, connection]: [Argument<'_, 'py>; 2]) -> Outcome<'py> {
        Ok(session(expect(&this)?, connection).into_bound_py_any(py)?)
    }
}

struct Put;
impl Body<3> for Put {
    const PARAMETERS: [&'static CStr; 3] = [c"self", c"database", c"session"];

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
    const PARAMETERS: [&'static CStr; 2] = [c"self", c"database"];

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
