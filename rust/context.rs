//! The current context.

use std::ffi::CStr;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyBool;

use crate::errors;
use crate::raw::{self, Argument, Body, Outcome, Raised, Store};
use crate::store;

pub struct OpenContext;
impl Body<1> for OpenContext {
    const PARAMETERS: [&'static CStr; 1] = [c"manual"];
    const REQUIRED: usize = 0;
    const GUARDED: bool = false;

    fn call<'py>(py: Python<'py>, [manual]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        Ok(enter(py, manual.is_truthy()?)?.0.into_any())
    }
}

/// Open a context; return it and its token.
#[inline(always)]
fn enter(py: Python<'_>, manual: bool) -> Result<(Bound<'_, Store>, Bound<'_, PyAny>), Raised> {
    let store = Store::new(py, manual)?;
    let token = raw::set(&store)?;
    let kept = token.clone().into();
    Store::with(&store, |inside| inside.token = Some(kept));
    Ok((store, token))
}

pub struct ResetContext;
impl Body<1> for ResetContext {
    const PARAMETERS: [&'static CStr; 1] = [c"store"];
    const GUARDED: bool = false;

    fn call<'py>(py: Python<'py>, [store]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        let store = store::expect(&store)?;
        let token = Store::with(store, |inside| inside.token.as_ref().map(|token| token.to_bound(py)));
        let Some(token) = token else {
            return Err(PyRuntimeError::new_err("this database session context has already been reset").into());
        };
        raw::reset(&token)?;
        drop(Store::with(store, |inside| inside.token.take()));
        Ok(py.None().into_bound(py))
    }
}

pub struct Init;
impl Body<1> for Init {
    const PARAMETERS: [&'static CStr; 1] = [c"force"];
    const REQUIRED: usize = 0;

    fn call<'py>(py: Python<'py>, [force]: [Argument<'_, 'py>; 1]) -> Outcome<'py> {
        if !force.is_truthy()? && is_initiated(py)? {
            return Err(errors::context_already_open(py));
        }
        Ok(enter(py, true)?.1)
    }
}

pub struct IsInitiated;
impl Body<0> for IsInitiated {
    const PARAMETERS: [&'static CStr; 0] = [];
    const GUARDED: bool = false;

    fn call<'py>(py: Python<'py>, []: [Argument<'_, 'py>; 0]) -> Outcome<'py> {
        Ok(PyBool::new(py, is_initiated(py)?).to_owned().into_any())
    }
}

fn is_initiated(py: Python<'_>) -> Result<bool, Raised> {
    Ok(Store::of(&raw::current(py)?).is_some_and(|store| !store::is_closed(store)))
}
