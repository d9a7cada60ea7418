//! A reference for other structures to own.

use std::ptr::NonNull;

use pyo3::ffi;
use pyo3::prelude::*;

use super::Argument;

/// An owned reference to an object.
///
/// `Py` would put off its drop, until PyO3 itself has attached the thread; here the interpreter has.
/// There is none of these in a thread that is not attached: each belongs to a Python object.
#[repr(transparent)]
pub struct Object(NonNull<ffi::PyObject>);

impl Object {
    /// The object, with a reference of its own.
    #[inline(always)]
    pub fn to_bound<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        // SAFETY: it is an object.
        unsafe { Bound::from_borrowed_ptr(py, self.0.as_ptr()) }
    }

    #[inline(always)]
    pub fn is(&self, other: Argument<'_, '_>) -> bool {
        self.as_ptr() == other.as_ptr()
    }

    #[inline(always)]
    pub fn as_ptr(&self) -> *mut ffi::PyObject {
        self.0.as_ptr()
    }
}

impl From<Bound<'_, PyAny>> for Object {
    #[inline(always)]
    fn from(object: Bound<'_, PyAny>) -> Self {
        // SAFETY: not null.
        Self(unsafe { NonNull::new_unchecked(object.into_ptr()) })
    }
}

impl Clone for Object {
    fn clone(&self) -> Self {
        // SAFETY: it is an object, and the thread is attached.
        unsafe { ffi::Py_INCREF(self.as_ptr()) };
        Self(self.0)
    }
}

impl Drop for Object {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: owned, and the thread is attached.
        unsafe { ffi::Py_DECREF(self.as_ptr()) }
    }
}
