//! The current context.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyBool;

use crate::errors;
use crate::lookup;
use crate::raw::{Argument, ContextVar, Outcome, Raised, SessionStore};
use crate::session_store;

pub fn open_context<'py>(py: Python<'py>, manual: Argument<'_, 'py>, read_only: Argument<'_, 'py>) -> Outcome<'py> {
    Ok(open(py, manual.is_truthy()?, read_only.is_truthy()?, true)?.0.into_any())
}

/// Open a context, and return the context and its token.
#[inline(always)]
fn open(
    py: Python<'_>,
    manual: bool,
    read_only: bool,
    of_this_thread: bool,
) -> Result<(Bound<'_, SessionStore>, Bound<'_, PyAny>), Raised> {
    let store = SessionStore::new(py, manual, read_only, of_this_thread)?;
    let token = ContextVar::set(&store)?;
    SessionStore::set_token(&store, Some(token.clone()));
    Ok((store, token))
}

pub fn reset_context<'py>(py: Python<'py>, store: Argument<'_, 'py>) -> Outcome<'py> {
    let store = session_store::expect(&store)?;
    let Some(token) = SessionStore::token(store) else {
        return Err(PyRuntimeError::new_err("this database session context has already been reset").into());
    };
    ContextVar::reset(&token)?;
    SessionStore::set_token(store, None);
    Ok(py.None().into_bound(py))
}

pub fn init_db_session_ctx<'py>(py: Python<'py>, force: Argument<'_, 'py>) -> Outcome<'py> {
    if !force.is_truthy()? && is_initiated(py)? {
        return Err(errors::context_already_open(py));
    }
    Ok(open(py, true, false, lookup::in_event_loop(py)?)?.1)
}

pub fn is_context_initiated(py: Python<'_>) -> Outcome<'_> {
    Ok(PyBool::new(py, is_initiated(py)?).to_owned().into_any())
}

fn is_initiated(py: Python<'_>) -> Result<bool, Raised> {
    Ok(SessionStore::of(&ContextVar::get(py)?).is_some_and(|store| !SessionStore::is_closed(store)))
}
