//! An owned reference to a Python object, for use in other objects.

use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use pyo3::ffi;
use pyo3::prelude::*;

use super::outcome::Argument;

/// An owned reference to a Python object.
///
/// PyO3 does not detect that the interpreter has attached the thread, and defers the drop of a `Py` until PyO3 itself
/// attaches the thread.  An `Object` is dropped at once.  Each `Object` is a part of a Python object, or is on its way
/// into or out of one in a function that the interpreter has called: the thread is attached whenever one is used.  The
/// type is private to the module `raw`, so that no other code can take an `Object` elsewhere.
#[repr(transparent)]
pub struct Object(NonNull<ffi::PyObject>);

impl Object {
    /// Another reference to the object.
    #[inline(always)]
    pub fn to_bound<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        // SAFETY: the pointer is to an object that `self` keeps alive.
        unsafe { Bound::from_borrowed_ptr(py, self.as_ptr()) }
    }

    /// This reference to the object.
    #[inline(always)]
    pub fn into_bound<'py>(self, py: Python<'py>) -> Bound<'py, PyAny> {
        let this = ManuallyDrop::new(self);
        // SAFETY: the reference is owned, and `ManuallyDrop` does not drop it.
        unsafe { Bound::from_owned_ptr(py, this.as_ptr()) }
    }

    #[inline(always)]
    pub fn as_argument<'a, 'py>(&'a self, py: Python<'py>) -> Argument<'a, 'py> {
        // SAFETY: the pointer is to an object that `self` keeps alive for the lifetime `'a`.
        unsafe { Argument::from_ptr(py, self.as_ptr()) }
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
        // SAFETY: the pointer of a `Bound` is not null.
        Self(unsafe { NonNull::new_unchecked(object.into_ptr()) })
    }
}

impl Clone for Object {
    fn clone(&self) -> Self {
        // SAFETY: the pointer is to an object that `self` keeps alive, and the thread is attached.
        unsafe { ffi::Py_INCREF(self.as_ptr()) };
        Self(self.0)
    }
}

impl Drop for Object {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the reference is owned, and the thread is attached.
        unsafe { ffi::Py_DECREF(self.as_ptr()) }
    }
}
